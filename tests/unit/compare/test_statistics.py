"""Ratios are paired round by round, and what they say takes their spread into account."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redirector.compare.cases import Metric, Rung
from redirector.compare.statistics import (
    Ratio,
    Result,
    Verdict,
    losses,
    medians,
    ratios,
    spread,
)


def result(rung: Rung, number: int, ops: float, p50: float | None = 10.0) -> Result:
    return Result("case", rung, number, p50, p50, p50, p50, ops, 1e6 / ops)


def ratio(low: float, middle: float, high: float, metric: Metric, rung: Rung = Rung.EBPF) -> Ratio:
    return Ratio("case", rung, Rung.IPTABLES, metric, middle, low, high)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3], (3, 3, 3)),
        ([3, 1, 2], (2, 1, 3)),
        (range(1, 7), (3.5, 1, 6)),
        (range(1, 10), (5, 2, 8)),
        (range(1, 11), (5.5, 2, 9)),
        (range(1, 21), (10.5, 6, 15)),
    ],
)
def test_spread_is_the_sign_test_interval(
    values: Sequence[float], expected: tuple[float, float, float]
) -> None:
    found = spread(list(values))
    assert (found.median, found.low, found.high) == expected


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60))
def test_spread_holds_the_median_of_what_was_measured(values: list[float]) -> None:
    found = spread(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)


def test_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_ratios_are_paired_within_a_round() -> None:
    # The machine slows down tenfold in round 2; the ratio does not see it.
    results = [
        result(Rung.IPTABLES, 1, 100),
        result(Rung.EBPF, 1, 200),
        result(Rung.IPTABLES, 2, 10),
        result(Rung.EBPF, 2, 20),
        result(Rung.EBPF, 3, 999),
    ]
    (found,) = [
        r
        for r in ratios(results)
        if (r.rung, r.versus, r.metric) == (Rung.EBPF, Rung.IPTABLES, Metric.OPS)
    ]
    assert (found.median, found.low, found.high) == (2, 2, 2)


def test_what_was_not_measured_has_no_ratio() -> None:
    only = [result(Rung.IPTABLES, 1, 100, p50=None), result(Rung.DIRECT, 1, 50, p50=None)]
    found = {(r.rung, r.versus, r.metric) for r in ratios(only)}
    assert found == {
        (Rung.DIRECT, Rung.IPTABLES, Metric.OPS),
        (Rung.DIRECT, Rung.IPTABLES, Metric.CPU),
    }


@pytest.mark.parametrize(
    ("metric", "low", "high", "verdict"),
    [
        (Metric.P50, 0.5, 0.9, Verdict.WINS),
        (Metric.P50, 1.1, 1.2, Verdict.LOSES),
        (Metric.P50, 0.9, 1.1, Verdict.EVEN),
        (Metric.CPU, 1.1, 1.2, Verdict.LOSES),
        (Metric.OPS, 1.1, 1.2, Verdict.WINS),
        (Metric.OPS, 0.5, 0.9, Verdict.LOSES),
        (Metric.OPS, 0.5, 1.0, Verdict.EVEN),
    ],
)
def test_a_verdict_needs_the_whole_spread(
    metric: Metric, low: float, high: float, verdict: Verdict
) -> None:
    assert ratio(low, (low + high) / 2, high, metric).verdict is verdict


def test_losses_are_those_of_ebpf_only() -> None:
    losing = ratio(1.1, 1.2, 1.3, Metric.P50)
    others = [
        ratio(0.7, 0.8, 0.9, Metric.P50),
        ratio(0.9, 1.2, 1.3, Metric.P50),
        ratio(1.1, 1.2, 1.3, Metric.P50, rung=Rung.LOOPBACK),
    ]
    assert losses([losing, *others]) == [losing]


def test_medians_over_the_rounds() -> None:
    rows = [result(Rung.EBPF, n, ops) for n, ops in enumerate((30, 10, 20), 1)]
    found = medians(rows, "case", Rung.EBPF)
    assert found is not None
    assert found.ops_per_s == 20
    assert medians(rows, "case", Rung.UNIX) is None
