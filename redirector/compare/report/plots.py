"""The page's plots as SVG. Colours and fonts are the style sheet's, by class. Pure."""

import math
from collections.abc import Callable, Iterable
from html import escape

from redirector.compare.cases import Case, Metric, Rung
from redirector.compare.report.data import Report
from redirector.compare.statistics import Ratio, Result, Verdict

_PERCENTILES = ("p50_us", "p90_us", "p99_us", "p999_us")
_PERCENTILE_LABELS = ("p50", "p90", "p99", "p99.9")
PRODUCT = (Rung.EBPF, Rung.SOCKMAP)


def css_class(rung: Rung) -> str:
    """The class that carries a rung's colour."""
    return "rung-" + rung.value.replace("+", "-")


# Latency distribution


def distribution(report: Report, case: Case) -> str:
    """Percentiles (by nines) against time (logarithmic), a line for each rung; medians of rounds.

    Only for cases that have latencies.
    """
    width, height, left, right, top, bottom = 430, 250, 52, 12, 12, 30
    found = ((rung, report.medians.get((case.name, rung))) for rung in report.rungs)
    rows = [(rung, row) for rung, row in found if row is not None]
    values = [v for _, row in rows for v in _latencies(row)]
    low = max(step for step in _steps() if step <= min(values))
    high = min(step for step in _steps() if step > max(values))
    xs = [left + (width - left - right) * i / 3 for i in range(4)]

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        return height - bottom - share * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    parts.append(f"<title>{escape(case.name)}: latency percentiles of each rung</title>")
    for tick in (step for step in _steps() if low <= step <= high):
        parts.append(_line("grid", left, y(tick), width - right, y(tick)))
        parts.append(_text("tick end", left - 6, y(tick) + 3.5, _short_us(tick)))
    for x, label in zip(xs, _PERCENTILE_LABELS, strict=True):
        parts.append(_line("grid", x, top, x, height - bottom))
        anchor = "end" if label == "p99.9" else "middle"
        parts.append(_text(f"tick {anchor}", x, height - bottom + 16, label))
    # Last drawn lies on top.
    for rung, row in rows:
        points = [(x, y(v)) for x, v in zip(xs, _latencies(row), strict=True)]
        joined = " ".join(f"{x:.1f},{v:.1f}" for x, v in points)
        parts.append(f'<g class="series {css_class(rung)}"><polyline points="{joined}"/>')
        for (x, at), label, value in zip(points, _PERCENTILE_LABELS, _latencies(row), strict=True):
            tip = escape(f"{rung} {label}: {value:.1f} µs")
            parts.append(f'<circle cx="{x:.1f}" cy="{at:.1f}" r="3"><title>{tip}</title></circle>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _latencies(row: Result) -> list[float]:
    return [getattr(row, name) for name in _PERCENTILES]


def _steps() -> list[float]:
    """1, 2 and 5 times the powers of ten that a latency in µs may need."""
    return [mantissa * 10.0**exponent for exponent in range(-2, 9) for mantissa in (1, 2, 5)]


def _short_us(value: float) -> str:
    return f"{value / 1000:g} ms" if value >= 1000 else f"{value:g} µs"


# Ratios

_ROW, _GROUP = 17, 10


def ratio_plot(report: Report, versus: Rung, metric: Metric) -> str:
    """A dot for each rung and case on a logarithmic axis, whiskers its spread, a line at 1."""
    width, left, right, top = 900, 272, 150, 34
    groups = [(case, list(_rows(report, case, versus, metric))) for case in report.cases]
    groups = [(case, rows) for case, rows in groups if rows]
    ratios = [ratio for _, rows in groups for ratio in rows]
    low = min(0.5, *(r.low for r in ratios)) / 1.06
    high = max(2.0, *(r.high for r in ratios)) * 1.06
    height = top + sum(len(rows) * _ROW + _GROUP for _, rows in groups) + 26

    def x(value: float) -> float:
        return left + (width - left - right) * math.log(value / low) / math.log(high / low)

    better_right = metric.more_is_better
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    parts.append(f"<title>{escape(f'{metric} as a ratio to {versus}')}</title>")
    shade = (x(1), width - right) if better_right else (left, x(1))
    parts.append(
        f'<rect class="better" x="{shade[0]:.1f}" y="{top - 6}" '
        f'width="{shade[1] - shade[0]:.1f}" height="{height - top - 16}"/>'
    )
    for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
        if low <= tick <= high:
            kind = "one" if tick == 1 else "grid"
            parts.append(_line(kind, x(tick), top - 6, x(tick), height - 22))
            parts.append(_text("tick middle", x(tick), height - 8, f"{tick:g}x"))
    words = ("worse", "better →") if better_right else ("← better", "worse")
    parts.append(_text("hint end", x(1) - 8, top - 14, words[0]))
    parts.append(_text("hint", x(1) + 8, top - 14, words[1]))
    at = float(top)
    for case, rows in groups:
        parts.append(_text("case", 0, at + 12, case.name))
        for ratio in rows:
            parts.append(_dot(ratio, at + _ROW / 2, x, left, width - right))
            at += _ROW
        at += _GROUP
        parts.append(_line("rule", 0, at - _GROUP / 2, width, at - _GROUP / 2))
    return "".join([*parts, "</svg>"])


def _rows(report: Report, case: Case, versus: Rung, metric: Metric) -> Iterable[Ratio]:
    for rung in report.rungs:
        ratio = report.ratio(case, rung, versus, metric)
        if ratio is not None:
            yield ratio


def _dot(ratio: Ratio, y: float, x: Callable[[float], float], left: float, right: float) -> str:
    strong = " product" if ratio.rung in PRODUCT else ""
    figures = f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
    centre, low, high = x(ratio.median), x(ratio.low), x(ratio.high)
    # Shape as well as colour tells a loss, for those who cannot tell the colours.
    if ratio.verdict is Verdict.LOSES:
        d = f"M{centre:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"
        mark = f'<path class="mark" d="{d}"/>'
    else:
        mark = f'<circle class="mark" cx="{centre:.1f}" cy="{y:.1f}" r="4.2"/>'
    tip = escape(f"{ratio.case}, {ratio.rung} / {ratio.versus}: {figures}, {ratio.verdict}")
    return (
        f'<g class="{ratio.verdict}{strong}"><title>{tip}</title>'
        + _text("rung end", left - 10, y + 4, ratio.rung.value)
        + _line("whisker", low, y, high, y)
        + _line("whisker", low, y - 3, low, y + 3)
        + _line("whisker", high, y - 3, high, y + 3)
        + mark
        + _text("figure", right + 10, y + 4, figures)
        + "</g>"
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
