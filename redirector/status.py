"""What is known of a node and its pods, as values. Pure."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from redirector.datapath.layout import ConnectKind, Counter, Defect
from redirector.model import Mode, Pod
from redirector.steering import RULES, Verdict


class Outcome(StrEnum):
    """What became of a connection, or of a direction of one; the first word of its counter."""

    STEERED = "steered"
    DIRECT = "direct"
    REFUSED = "refused"
    #: Left to TCP where it might have been short-circuited: a socket, or one direction.
    PASSED = "passed"
    #: An option that a short-circuited socket was not given; its program does without.
    WITHHELD = "withheld"


@dataclass(frozen=True)
class Tally:
    """How many connections had this outcome for this reason."""

    outcome: Outcome
    reason: str
    count: int


@dataclass(frozen=True)
class Latency:
    """How long connections took from SYN to established.

    Bucket b counts up to 2^b µs, and what no smaller one did; the last one all that took longer.
    """

    buckets: tuple[int, ...]
    seconds: float

    @property
    def count(self) -> int:
        """How many connections there were."""
        return sum(self.buckets)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(seconds, how many took no longer), the last bucket left out."""
        total = 0
        for exponent, count in enumerate(self.buckets[:-1]):
            total += count
            yield 2**exponent / 1e6, total

    def quantile(self, part: float) -> float:
        """A bound in seconds that this part of the connections kept; infinity past the buckets."""
        wanted = part * self.count
        return next((bound for bound, n in self.cumulative() if n >= wanted), float("inf"))


@dataclass(frozen=True)
class MapFill:
    """How full one of the datapath's maps is."""

    name: str
    entries: int
    max_entries: int


@dataclass(frozen=True)
class PodStatus:
    """A pod as recorded, what the kernel lacks of it, and what it has counted."""

    pod: Pod
    missing: tuple[str, ...]
    #: eBPF mode only.
    counters: dict[Counter, int]
    #: What the kernel does wrong with redirected bytes; `accelerate auto` is off then.
    defects: Defect
    #: Whether the namespace and cgroup are those that were enrolled: what is missing can be put
    #: back.
    repairable: bool
    #: In either mode, by the same names.
    tallies: tuple[Tally, ...] = ()
    #: By what became of the connections; eBPF mode only.
    latencies: Mapping[ConnectKind, Latency] = field(default_factory=dict)
    #: Connections that it has opened and that are in the flows map; eBPF mode only.
    flows: int | None = None

    @property
    def accelerated(self) -> bool:
        """Whether the pod's steered connections are short-circuited."""
        holds = self.pod.accelerate.holds(defects=bool(self.defects))
        return self.pod.mode is Mode.EBPF and holds


@dataclass(frozen=True)
class NodeStatus:
    """All of a node at one moment."""

    pods: tuple[PodStatus, ...]
    maps: tuple[MapFill, ...] = ()
    #: What is wrong with redirected bytes on this kernel; none when nothing is loaded.
    defects: Defect = field(default_factory=lambda: Defect(0))
    #: What the agent refused or could not do, by pod; such a pod keeps what it has.
    problems: Mapping[str, str] = field(default_factory=dict)
    #: Who follows the flows, and how many events found no room since the programs were loaded.
    followers: int = 0
    events_lost: int = 0
    #: How many flows each pod may have, whatever the others have.
    flows_floor: int = 0


#: What acceleration did.
SHORT_CIRCUIT = (Counter.ACCELERATED, Counter.REDIRECTED_BYTES, Counter.REDIRECTED_MESSAGES)


def tallies(counters: Mapping[Counter, int], rules: Mapping[str, int]) -> tuple[Tally, ...]:
    """The counters that count connections or directions, by outcome and reason.

    `rules` are how often each rule decided: the direct ones are told by name.
    """
    direct = (rule.name for rule in RULES if rule.verdict is Verdict.DIRECT)
    by_rule = (Tally(Outcome.DIRECT, name, rules.get(name, 0)) for name in direct)
    return (*_tallies(counters), *by_rule)


def _tallies(counters: Mapping[Counter, int]) -> Iterator[Tally]:
    outcomes = {outcome.value: outcome for outcome in Outcome}
    for counter, count in counters.items():
        first, _, rest = counter.name.lower().partition("_")
        if first in outcomes:
            yield Tally(outcomes[first], rest.replace("_", "-"), count)


def defect_names(defects: Defect) -> list[str]:
    """What the kernel does wrong, by name."""
    return [str(defect.name).lower() for defect in defects]


class Steady:
    """What pods have redirected, never told as less than before.

    It is counted in two places: an open flow's in the flow, and in the pod's counters as it closes.
    They are read one after the other, so that one that closes in between is in neither.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By pod: what its counters held alone, and what was told; in the last reading and in this.
        self._before: dict[str, dict[Counter, tuple[int, int]]] = {}
        self._now: dict[str, dict[Counter, tuple[int, int]]] = {}

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep other readers out, and forget the pods that this one does not tell of."""
        with self._lock:
            self._before, self._now = self._now, {}
            yield

    def told(
        self, pod: Pod, closed: Mapping[Counter, int], moved: tuple[int, int]
    ) -> dict[Counter, int]:
        """The pod's counters, with the bytes and messages that open flows have `moved`."""
        found, now = dict(closed), self._now.setdefault(pod.name, {})
        last = self._before.get(pod.name, {})
        for counter, opened in zip(_REDIRECTED, moved, strict=True):
            began, before = last.get(counter, (0, 0))
            total = closed[counter] + opened
            # Counters that are less than they were have begun anew.
            found[counter] = max(total, before) if closed[counter] >= began else total
            now[counter] = (closed[counter], found[counter])
        return found


_REDIRECTED = (Counter.REDIRECTED_BYTES, Counter.REDIRECTED_MESSAGES)
