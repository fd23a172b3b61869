"""What happened so far, in numbers. Pure."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE, kind

_LABELS = {url: kind(url) for url in (CLUSTER, ENDPOINT, LISTENER, ROUTE, FILTER)}
#: Clients may name any type: metrics know ours, and all others as one.
_OTHER = "other"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BYTES = (100, 1000, 10_000, 100_000, 1_000_000, 3_145_728)


class Distribution:
    """How often values fell below each of the bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value in."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, int]]:
        """Cumulative, as Prometheus has them: upper bound -> values up to it."""
        bounds = (*map(str, self._bounds), "+Inf")
        return list(zip(bounds, accumulate(self._counts), strict=True))


def label(type_url: str) -> str:
    """A type as metrics know it: few, whatever clients ask for."""
    return _LABELS.get(type_url, _OTHER)


@dataclass
class Tally:
    """By type where it says so; times in seconds."""

    push_seconds: Distribution = field(default_factory=lambda: Distribution(SECONDS))
    unanswered_pushes: int = 0
    ack_seconds: defaultdict[str, Distribution] = field(
        default_factory=lambda: defaultdict(lambda: Distribution(SECONDS))
    )
    response_bytes: defaultdict[str, Distribution] = field(
        default_factory=lambda: defaultdict(lambda: Distribution(BYTES))
    )
    nacks: Counter[str] = field(default_factory=Counter)
    #: Objects that were read last, and mistakes in them.
    objects: int = 0
    problems: int = 0
    #: Why what was read last may be old; none while the source answers.
    hindrances: Callable[[], Sequence[str]] = tuple
