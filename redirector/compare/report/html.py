"""The report as one self-contained page: no link leads out of it. Pure but for its style sheet."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from redirector.compare.cases import RUNG_TEXT, Case, Load, Metric, Rung
from redirector.compare.report.data import METRIC_TEXT, Loss, Report
from redirector.compare.report.plots import PRODUCT, css_class, distribution, ratio_plot
from redirector.compare.statistics import Ratio, Verdict

STYLE = Path(__file__).with_name("page.css")
#: What a visitor looks for first: case, metric and how it reads.
_HEADLINES = (
    ("echo-64B", Metric.P50, "the time of iptables for 64 B there and back"),
    ("http-1-sidecar-c16", Metric.OPS, "the requests a second of iptables, 16 connections"),
    ("http-1-sidecar-c16", Metric.CPU, "the CPU time a request of iptables, 16 connections"),
    ("connect-rate", Metric.OPS, "the new connections a second of iptables"),
)
# Shows the one plot that is chosen; without scripts all of them are shown.
_SCRIPT = """
function show() {
  const value = name => document.querySelector(`input[name=${name}]:checked`).value;
  const wanted = `${value("versus")} ${value("metric")}`;
  for (const plot of document.querySelectorAll(".plot")) plot.hidden = plot.dataset.is !== wanted;
}
for (const input of document.querySelectorAll(".tabs input")) {
  input.addEventListener("change", show);
}
if (document.querySelector(".tabs")) show();
"""


def render(report: Report) -> str:
    """Return the page."""
    body = "\n".join(
        [
            *_header(report),
            *_losses(report),
            *_ratios(report),
            *_distributions(report),
            *_figures(report),
            *_method(report),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>From application to sidecar: what each way costs</title>"
        f"<style>\n{STYLE.read_text()}</style></head><body><main>\n{body}\n</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _header(report: Report) -> Iterator[str]:
    host = report.host
    yield "<h1>From application to sidecar: what each way costs</h1>"
    yield (
        f'<p class="soft">{report.rounds} rounds on Linux {escape(host.kernel)}, '
        f"{escape(host.cpu_model)}, Envoy {escape(host.envoy)}, {escape(host.date)}. "
        "Figures of one run are compared with each other only; what counts is ratios.</p>"
    )
    yield '<div class="tiles">'
    cases = {case.name: case for case in report.cases}
    for name, metric, text in _HEADLINES:
        ratio = name in cases and report.ratio(cases[name], Rung.SOCKMAP, Rung.IPTABLES, metric)
        if ratio:
            yield (
                f'<div class="tile {ratio.verdict}"><b>{ratio.median:.2f}x</b>{escape(text)}'
                f"<br><small>ebpf+sockmap, {ratio.low:.2f} to {ratio.high:.2f}</small></div>"
            )
    yield "</div>"
    yield '<ul class="legend">'
    for rung in report.rungs:
        yield (
            f'<li class="{css_class(rung)}"><i></i><span>{rung}</span> '
            f"<em>{escape(RUNG_TEXT[rung])}</em></li>"
        )
    yield "</ul>"


def _losses(report: Report) -> Iterator[str]:
    yield '<h2>Where eBPF loses</h2><div class="losses scroll">'
    if not report.losses:
        yield "<p>Nowhere in this run, beyond the spread of the rounds.</p>"
    for versus, title in (
        (Rung.IPTABLES, "against iptables"),
        (Rung.EBPF, "against steering alone"),
        (Rung.UNIX, "against a Unix socket"),
    ):
        found = [loss for loss in report.losses if loss.versus is versus]
        if found:
            heads = "".join(f"<th>{text}</th>" for text in METRIC_TEXT.values())
            yield f"<table><thead><tr><th>{title}</th><th></th>{heads}</tr></thead><tbody>"
            yield from map(_loss, found)
            yield "</tbody></table>"
        elif versus in report.baselines and report.losses:
            yield f'<p class="soft">{title}: nowhere beyond the spread of the rounds</p>'
    yield "</div>"


def _loss(loss: Loss) -> str:
    cells = []
    for metric in METRIC_TEXT:
        ratio = loss.ratio(metric)
        cells.append(
            f"<td><b>{ratio.median:.2f}x</b> <small>{ratio.low:.2f}–{ratio.high:.2f}</small></td>"
            if ratio
            else "<td></td>"
        )
    return f"<tr><td>{loss.case}</td><td>{loss.rung}</td>{''.join(cells)}</tr>"


def _ratios(report: Report) -> Iterator[str]:
    if not report.ratios:
        return
    yield "<h2>Ratios</h2>"
    yield (
        "<p>Each dot is the median over the rounds of a rung divided by the chosen one, both "
        "taken in the same round; whiskers hold the true median with 95 % (below six rounds: "
        "all rounds). Filled green wins, hollow grey is even, a red diamond loses.</p>"
    )
    yield '<div class="tabs">'
    yield _choice("versus", "against", {rung.value: rung.value for rung in report.baselines})
    yield _choice("metric", "in", {metric.value: text for metric, text in METRIC_TEXT.items()})
    yield "</div>"
    for versus in report.baselines:
        for metric in Metric:
            if any(r.versus is versus and r.metric is metric for r in report.ratios):
                yield (
                    f'<div class="plot scroll" data-is="{versus} {metric}">'
                    f'<p class="soft">{METRIC_TEXT[metric]}, as a ratio to {versus}</p>'
                    f"{ratio_plot(report, versus, metric)}</div>"
                )


def _choice(name: str, legend: str, options: dict[str, str]) -> str:
    parts = [f"<fieldset><legend>{legend}</legend>"]
    for i, (value, text) in enumerate(options.items()):
        checked = " checked" if i == 0 else ""
        parts.append(
            f'<input type="radio" name="{name}" id="{name}-{i}" value="{escape(value)}"{checked}>'
            f'<label for="{name}-{i}">{escape(text)}</label>'
        )
    return "".join([*parts, "</fieldset>"])


def _distributions(report: Report) -> Iterator[str]:
    cases = [
        case
        for case in report.cases
        if case.has_latency and any(name == case.name for name, _ in report.medians)
    ]
    if not cases:
        return
    yield "<h2>Latency distribution</h2>"
    yield "<p>Percentiles of one operation, medians over the rounds; the time is logarithmic.</p>"
    yield '<ul class="legend">'
    yield from (
        f'<li class="{css_class(rung)}"><i></i><span>{rung}</span></li>' for rung in report.rungs
    )
    yield '</ul><div class="charts">'
    for case in cases:
        yield (
            f"<figure><h3>{case.name}</h3><figcaption>{escape(case.text)}</figcaption>"
            f"{distribution(report, case)}</figure>"
        )
    yield "</div>"


def _figures(report: Report) -> Iterator[str]:
    yield '<h2>Figures</h2><div class="scroll"><table><thead><tr><th></th>'
    heads = ("p50 µs", "p90 µs", "p99 µs", "p99.9 µs", "ops/s", "CPU µs/op")
    yield "".join(f"<th>{head}</th>" for head in heads)
    versus = [rung for rung in (Rung.IPTABLES, Rung.UNIX) if rung in report.baselines]
    yield "".join(f"<th>÷ {rung}</th>" for rung in versus) + "</tr></thead><tbody>"
    for case in report.cases:
        main = METRIC_TEXT[case.main]
        columns = 1 + len(heads) + len(versus)
        yield (
            f'<tr><th colspan="{columns}">{case.name}<small>{escape(case.text)}; '
            f"ratios of {main}</small></th></tr>"
        )
        for rung in report.rungs:
            kind = ' class="product"' if rung in PRODUCT else ""
            cells = "".join(f"<td>{cell}</td>" for cell in _cells(report, case, rung))
            ratios = (report.ratio(case, rung, other, case.main) for other in versus)
            yield f"<tr{kind}><td>{rung}</td>{cells}{''.join(map(_ratio_cell, ratios))}</tr>"
    yield "</tbody></table></div>"
    for case, rung, reason in report.absent():
        yield f'<p class="soft">n/a: {case.name} on {rung}: {escape(reason)}.</p>'


def _cells(report: Report, case: Case, rung: Rung) -> Iterator[str]:
    m = report.medians.get((case.name, rung))
    if m is None:
        yield from ["n/a"] * 6
        return
    for value in (m.p50_us, m.p90_us, m.p99_us, m.p999_us):
        yield "n/a" if value is None else f"{value:,.1f}"
    gbit = f"{case.gbit(m.ops_per_s):.1f} Gbit/s, " if case.load is Load.BULK else ""
    yield f"{gbit}{m.ops_per_s:,.0f}"
    yield f"{m.cpu_us_per_op:,.2f}"


def _ratio_cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return "<td></td>"
    kind = "" if ratio.verdict is Verdict.EVEN else f' class="{ratio.verdict}"'
    sign = {Verdict.WINS: "", Verdict.EVEN: "", Verdict.LOSES: " loses"}[ratio.verdict]
    return f"<td{kind}>{ratio.median:.2f}{sign}</td>"


def _method(report: Report) -> Iterator[str]:
    host = report.host
    yield "<h2>How it was measured</h2>"
    yield (
        "<p>Every rung stands for the whole run: pods are network namespaces with cgroups of "
        "their own on a bridge, sidecars are real Envoys as uid 1337, steering is the product's "
        "with all its safety rules. Each round goes through all cases; the rungs of a case follow "
        "each other directly, beginning with another one each round, so that a machine that slows "
        "down for a while does not single one out. The load is a small LuaJIT program that makes "
        "the same system calls on TCP and Unix sockets; it warms up, then measures.</p>"
        "<p>Latencies are of a whole operation, from before its first byte is sent to after its "
        "last is received. CPU time is what the cgroups of all pods on the way used while the "
        "load measured, client and servers together. Streams count bytes once the far end has "
        "read them. On the direct rung the far end is a lean server in another pod, so HTTP there "
        "is without any Envoy.</p>"
    )
    yield '<table class="facts"><tbody>'
    for name, value in (
        ("kernel", host.kernel),
        ("processor", f"{host.cpu_model}, {host.cpus} CPUs, {host.memory_mib} MiB"),
        ("Envoy", host.envoy),
        ("pinning", f"CPU {host.pinned_to_cpu}: {host.pinning}"),
        ("rounds", f"{host.rounds}, {host.seconds:g} s each after {host.warmup_s:g} s warm-up"),
        ("load before", f"{host.load_average:.2f} (a busy machine blurs all figures)"),
        ("date", host.date),
    ):
        yield f"<tr><td>{name}</td><td>{escape(value)}</td></tr>"
    yield "</tbody></table>"
