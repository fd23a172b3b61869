"""A node's status as Prometheus metrics: names and labels by Prometheus' conventions. Pure.

https://prometheus.io/docs/practices/naming/ ; the list is in docs/operations.md.
"""

from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from itertools import chain

from prometheus_client import exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric

from redirector.datapath.layout import Counter
from redirector.exposition import text
from redirector.model import Mode
from redirector.status import NodeStatus, Outcome, PodStatus, defect_names

#: The Content-Type of what `render` answers.
CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST
_POD = ("namespace", "pod")
#: How many pods' samples are made at a time.
_PART = 50
#: Of the buckets, every second one from 16 µs to 16.8 s: a series each, for every pod.
_BOUNDS = frozenset(2**exponent / 1e6 for exponent in range(4, 26, 2))


def render(status: NodeStatus, others: Iterable[Metric] = ()) -> Iterator[bytes]:
    """The text format of Prometheus, in pieces; `others` are families of whoever serves it.

    A sample costs half a kilobyte on its way to text, and a node of a thousand pods has 66,000.
    """
    name = ""
    for part in chain(families(status), others):
        lines = text([part])
        # Those that begin a family, HELP and TYPE, are told once.
        yield lines if part.name != name else lines.split(b"\n", 2)[2]
        name = part.name


def families(status: NodeStatus) -> Iterator[Metric]:
    """Every metric family of a node, those with many samples in parts that follow each other."""
    yield _build_info()
    yield _pods(status)
    yield from _in_parts(_missing, status.pods)
    yield _defects(status)
    yield from _in_parts(_connections, status.pods)
    yield from _in_parts(_passed, status.pods)
    yield from _in_parts(_withheld, status.pods)
    yield from _in_parts(_latency, status.pods)
    for counted in _SHORT_CIRCUIT:
        yield from _in_parts(partial(_counted, *counted), status.pods)
    yield from _events(status)
    yield from _in_parts(_flows, status.pods)
    yield _floor(status)
    yield from _maps(status)


def _in_parts(
    family: Callable[[Sequence[PodStatus]], Metric], pods: Sequence[PodStatus]
) -> Iterator[Metric]:
    for start in range(0, max(1, len(pods)), _PART):
        yield family(pods[start : start + _PART])


def _names(status: PodStatus) -> list[str]:
    """namespace and pod; the first is empty for a pod enrolled under a plain name."""
    namespace, _, name = status.pod.name.rpartition("/")
    return [namespace, name]


def _build_info() -> Metric:
    family = GaugeMetricFamily(
        "redirector_build_info", "1, with the version as a label", labels=("version",)
    )
    family.add_metric([metadata.version("redirector")], 1)
    return family


def _pods(status: NodeStatus) -> Metric:
    family = GaugeMetricFamily(
        "redirector_pods",
        "Enrolled pods by mode and by whether their connections are short-circuited",
        labels=("mode", "accelerated"),
    )
    numbers = Count((pod.pod.mode, pod.accelerated) for pod in status.pods)
    for mode, accelerated in ((Mode.EBPF, True), (Mode.EBPF, False), (Mode.IPTABLES, False)):
        family.add_metric([mode, str(accelerated).lower()], numbers[mode, accelerated])
    return family


def _missing(pods: Sequence[PodStatus]) -> Metric:
    family = GaugeMetricFamily(
        "redirector_pod_missing_parts",
        "What the kernel lacks of an enrolled pod: hooks, rules, its namespace; 0 when whole",
        labels=_POD,
    )
    for pod in pods:
        family.add_metric(_names(pod), len(pod.missing))
    return family


def _defects(status: NodeStatus) -> Metric:
    family = GaugeMetricFamily(
        "redirector_kernel_defect",
        "1 for each thing that this kernel does wrong with redirected bytes",
        labels=("defect",),
    )
    for name in defect_names(status.defects):
        family.add_metric([name], 1)
    return family


def _connections(pods: Sequence[PodStatus]) -> Metric:
    family = CounterMetricFamily(
        "redirector_connections",
        "Connections by verdict: steered to which listener, direct by which rule, refused and why",
        labels=(*_POD, "mode", "verdict", "reason"),
    )
    for pod in pods:
        for tally in pod.tallies:
            if tally.outcome not in (Outcome.PASSED, Outcome.WITHHELD):
                labels = [*_names(pod), pod.pod.mode, tally.outcome, tally.reason]
                family.add_metric(labels, tally.count)
    return family


def _passed(pods: Sequence[PodStatus]) -> Metric:
    family = CounterMetricFamily(
        "redirector_passed",
        "Sockets, or directions of a connection, left to TCP instead of short-circuited, and why",
        labels=(*_POD, "reason"),
    )
    return _of_outcome(family, Outcome.PASSED, pods)


def _withheld(pods: Sequence[PodStatus]) -> Metric:
    family = CounterMetricFamily(
        "redirector_withheld_options",
        "Socket options that short-circuited sockets were not given",
        labels=(*_POD, "option"),
    )
    return _of_outcome(family, Outcome.WITHHELD, pods)


def _of_outcome(family: CounterMetricFamily, outcome: Outcome, pods: Sequence[PodStatus]) -> Metric:
    for pod in pods:
        for tally in pod.tallies:
            if tally.outcome is outcome:
                family.add_metric([*_names(pod), tally.reason], tally.count)
    return family


def _latency(pods: Sequence[PodStatus]) -> Metric:
    family = HistogramMetricFamily(
        "redirector_connect_seconds",
        "Time from SYN to established of the connections that a pod opened (eBPF mode)",
        labels=(*_POD, "verdict"),
    )
    for pod in pods:
        for kind, latency in pod.latencies.items():
            bounds = [pair for pair in latency.cumulative() if pair[0] in _BOUNDS]
            buckets = [(str(bound), n) for bound, n in bounds]
            family.add_metric(
                [*_names(pod), kind.name.lower()],
                [*buckets, ("+Inf", latency.count)],
                latency.seconds,
            )
    return family


_SHORT_CIRCUIT = (
    (Counter.ACCELERATED, "redirector_accelerated_sockets", "Sockets that were short-circuited"),
    (
        Counter.REDIRECTED_BYTES,
        "redirector_redirected_bytes",
        "Bytes moved from socket to socket, past TCP",
    ),
    (
        Counter.REDIRECTED_MESSAGES,
        "redirector_redirected_messages",
        "Messages (a send() each) moved from socket to socket, past TCP",
    ),
)


def _counted(counter: Counter, name: str, what: str, pods: Sequence[PodStatus]) -> Metric:
    family = CounterMetricFamily(name, what, labels=_POD)
    for pod in pods:
        if counter in pod.counters:
            family.add_metric(_names(pod), pod.counters[counter])
    return family


def _events(status: NodeStatus) -> Iterator[Metric]:
    followers = GaugeMetricFamily("redirector_flow_followers", "Processes that follow the flows")
    followers.add_metric([], status.followers)
    yield followers
    lost = CounterMetricFamily(
        "redirector_flow_events_lost",
        "Events that found no room in a follower's buffer, since the programs were loaded",
    )
    lost.add_metric([], status.events_lost)
    yield lost


def _flows(pods: Sequence[PodStatus]) -> Metric:
    family = GaugeMetricFamily(
        "redirector_flows",
        "Connections in the flows map that a pod has opened: steered, or short-circuited",
        labels=_POD,
    )
    for pod in pods:
        if pod.flows is not None:
            family.add_metric(_names(pod), pod.flows)
    return family


def _floor(status: NodeStatus) -> Metric:
    family = GaugeMetricFamily(
        "redirector_flows_floor", "How many flows each pod may have, whatever the others have"
    )
    family.add_metric([], status.flows_floor)
    return family


def _maps(status: NodeStatus) -> Iterator[Metric]:
    entries = GaugeMetricFamily(
        "redirector_map_entries", "Entries in a map of the datapath", labels=("map",)
    )
    limits = GaugeMetricFamily(
        "redirector_map_max_entries",
        "Entries that a map of the datapath has room for",
        labels=("map",),
    )
    for fill in status.maps:
        entries.add_metric([fill.name], fill.entries)
        limits.add_metric([fill.name], fill.max_entries)
    yield entries
    yield limits
