"""The report on the terminal."""

from collections.abc import Iterator, Sequence

from redirector.compare.cases import RUNG_TEXT, Case, Load, Metric, Rung
from redirector.compare.report.data import METRIC_TEXT, Report
from redirector.compare.statistics import Ratio, Verdict

_HEAD = ("", "p50 µs", "p90 µs", "p99 µs", "p99.9 µs", "ops/s", "CPU µs/op")
_MARKS = {Verdict.WINS: "+", Verdict.EVEN: "=", Verdict.LOSES: "-"}


def render(report: Report) -> str:
    """Return figures, ratios with their spread, and where eBPF loses."""
    return "\n".join([*_figures(report), *_ratios(report), *_losses(report)]) + "\n"


def _figures(report: Report) -> Iterator[str]:
    host = report.host
    yield (
        f"{report.rounds} rounds on Linux {host.kernel}, {host.cpu_model}, Envoy {host.envoy}, "
        f"all on CPU {host.pinned_to_cpu}; medians over the rounds"
    )
    yield ""
    width = max(len(rung) for rung in report.rungs)
    for rung in report.rungs:
        yield f"  {rung:<{width}}  {RUNG_TEXT[rung]}"
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
            what = "time (p50), of streams operations a second"
            if metric:
                aim = "more" if metric.more_is_better else "less"
                what = f"{METRIC_TEXT[metric]}, {aim} is better"
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
    return f"{_spread(ratio)} {_MARKS[ratio.verdict]}"


def _losses(report: Report) -> Iterator[str]:
    yield ""
    if not report.losses:
        yield "Where eBPF loses: nowhere beyond the spread"
        return
    yield "Where eBPF loses, beyond the spread:"
    rows: list[Sequence[str]] = [("", "", "to", *METRIC_TEXT.values())]
    for loss in report.losses:
        cells = (_spread(loss.ratio(metric)) for metric in METRIC_TEXT)
        rows.append((loss.case, loss.rung.value, loss.versus.value, *cells))
    yield from _aligned(rows)


def _spread(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  " + "  ".join(cells).rstrip()
