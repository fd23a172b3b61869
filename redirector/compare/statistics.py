"""From measurements to ratios with their spread. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import comb
from statistics import median

from redirector.compare.cases import BASELINES, Metric, Rung


@dataclass(frozen=True)
class Result:
    """One measurement. Times in µs; a latency is None where the case has none."""

    case: str
    rung: Rung
    round: int
    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    p999_us: float | None
    ops_per_s: float
    cpu_us_per_op: float

    def value(self, metric: Metric) -> float | None:
        """Return the value of `metric`."""
        value: float | None = getattr(self, metric.value)
        return value


class Verdict(StrEnum):
    """What a ratio says, its spread taken into account."""

    WINS = "wins"
    EVEN = "even"
    LOSES = "loses"


@dataclass(frozen=True)
class Spread:
    """A median and the interval around it, see `spread`."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """`rung` divided by `versus`, both taken from the same rounds."""

    case: str
    rung: Rung
    versus: Rung
    metric: Metric
    median: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """WINS or LOSES only where the whole interval is on that side of 1."""
        if self.low <= 1 <= self.high:
            return Verdict.EVEN
        return Verdict.WINS if (self.low > 1) is self.metric.more_is_better else Verdict.LOSES


def spread(values: Sequence[float], confidence: float = 0.95) -> Spread:
    """Return the median and the tightest order statistics that hold the true one.

    The interval is the sign test's: it covers the median of the distribution with at least
    `confidence`, whatever that distribution is. Below six values none can reach 95 %; it is then
    the least and the greatest. Raises ValueError on no values.
    """
    if not values:
        raise ValueError("spread of no values")
    ordered = sorted(values)
    n = len(ordered)
    cut, tail = 0, 0.0
    while cut + 1 <= (n - 1) // 2:
        tail += comb(n, cut) / 2**n
        if 1 - 2 * (tail + comb(n, cut + 1) / 2**n) < confidence:
            break
        cut += 1
    return Spread(median(ordered), ordered[cut], ordered[n - 1 - cut])


def medians(results: Iterable[Result], case: str, rung: Rung) -> Result | None:
    """Return the median of every metric over the rounds (as round 0), None without results."""
    rows = [r for r in results if r.case == case and r.rung is rung]
    if not rows:
        return None

    def middle(values: Iterable[float | None]) -> float | None:
        present = [v for v in values if v is not None]
        return median(present) if present else None

    return Result(
        case,
        rung,
        0,
        middle(r.p50_us for r in rows),
        middle(r.p90_us for r in rows),
        middle(r.p99_us for r in rows),
        middle(r.p999_us for r in rows),
        median(r.ops_per_s for r in rows),
        median(r.cpu_us_per_op for r in rows),
    )


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """Every rung against every baseline, per case and metric, paired round by round.

    In the order of the results' first appearance. A pair that shares no round has no ratio.
    """
    cases = list(dict.fromkeys(r.case for r in results))
    table = {(r.case, r.rung, r.round): r for r in results}
    rounds = sorted({r.round for r in results})
    found: list[Ratio] = []
    for case in cases:
        for rung in Rung:
            for versus in BASELINES:
                if rung is versus:
                    continue
                for metric in Metric:
                    paired = _paired(table, case, (rung, versus), rounds, metric)
                    if paired:
                        s = spread(paired)
                        found.append(Ratio(case, rung, versus, metric, s.median, s.low, s.high))
    return found


def _paired(
    table: dict[tuple[str, Rung, int], Result],
    case: str,
    pair: tuple[Rung, Rung],
    rounds: Iterable[int],
    metric: Metric,
) -> list[float]:
    """The ratio of the pair in every round that has both."""
    found: list[float] = []
    for number in rounds:
        mine, other = (table.get((case, rung, number)) for rung in pair)
        if mine is None or other is None:
            continue
        a, b = mine.value(metric), other.value(metric)
        if a is not None and b:
            found.append(a / b)
    return found


def losses(found: Iterable[Ratio]) -> list[Ratio]:
    """Where eBPF loses: its ratios that are worse than 1 beyond their spread.

    Steering alone is held against iptables and the Unix socket, acceleration against steering
    alone too: somebody who may switch it on wants to know when not to.
    """
    return [
        ratio
        for ratio in found
        if ratio.rung in (Rung.EBPF, Rung.SOCKMAP) and ratio.verdict is Verdict.LOSES
    ]
