"""The report on the terminal."""

from collections.abc import Iterator, Sequence

from redirector.compare.cases import Case, Load, Metric, Rung
from redirector.compare.report.data import Report
from redirector.compare.statistics import Ratio, Verdict

_HEAD = ("", "p50 µs", "p90 µs", "p99 µs", "p99.9 µs", "ops/s", "CPU µs/op")
_MARKS = {Verdict.WINS: "+", Verdict.EVEN: "=", Verdict.LOSES: "-"}
_METRIC_TEXT = {
    Metric.P50: "time (p50), less is better",
    Metric.OPS: "operations a second, more is better",
    Metric.CPU: "CPU time an operation, less is better",
}


def render(report: Report) -> str:
    """Return figures, ratios with their spread, and where eBPF loses."""
    return "\n".join([*_figures(report), *_ratios(report), *_losses(report)]) + "\n"


def _figures(report: Report) -> Iterator[str]:
    host = report.host
    yield (
        f"{report.rounds} rounds on Linux {host.kernel}, {host.cpu_model}, Envoy {host.envoy}, "
        f"all on CPU {host.pinned_to_cpu}; medians over the rounds"
    )
    for case in report.cases:
        yield ""
        yield f"{case.name}: {case.text}"
        rows = [_HEAD, *(_row(report, case, rung) for rung in report.rungs)]
        yield from _aligned(rows)


def _row(report: Report, case: Case, rung: Rung) -> tuple[str, ...]:
    m = report.medians.get((case.name, rung))
    if m is None:
        return (rung.value, *("n/a" for _ in _HEAD[1:]))
    latencies = (m.p50_us, m.p90_us, m.p99_us, m.p999_us)
    rate = f"{m.ops_per_s:,.0f}"
    if case.load is Load.BULK:
        rate = f"{case.gbit(m.ops_per_s):.1f} Gbit/s {rate:>9}"
    return (
        rung.value,
        *("n/a" if value is None else f"{value:.1f}" for value in latencies),
        rate,
        f"{m.cpu_us_per_op:.2f}",
    )


def _ratios(report: Report) -> Iterator[str]:
    for versus in report.baselines:
        # All metrics against iptables; against the others what the case is about.
        metrics = tuple(Metric) if versus is Rung.IPTABLES else (None,)
        for metric in metrics:
            rungs = [rung for rung in report.rungs if rung is not versus]
            what = _METRIC_TEXT[metric] if metric else "time (p50), for streams operations a second"
            rows: list[Sequence[str]] = [("", *(rung.value for rung in rungs))]
            for case in report.cases:
                ratios = [report.ratio(case, rung, versus, metric or case.main) for rung in rungs]
                if any(ratios):
                    rows.append((case.name, *map(_cell, ratios)))
            yield ""
            yield f"{what}: ratio to {versus}, median (spread over the rounds)"
            yield from _aligned(rows)
    yield ""
    yield "+ wins, - loses, = even: the spread holds 1"
    for case, rung, reason in report.absent():
        yield f"n/a: {case.name} on {rung}: {reason}"


def _cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return "n/a"
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) {_MARKS[ratio.verdict]}"


def _losses(report: Report) -> Iterator[str]:
    yield ""
    if not report.losses:
        yield "Where eBPF loses: nowhere beyond the spread"
        return
    yield "Where eBPF loses:"
    rows = [(loss.case, loss.text()) for loss in report.losses]
    width = max(len(case) for case, _ in rows)
    for case, text in rows:
        yield f"  - {case:<{width}}  {text}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  " + "  ".join(cells).rstrip()
