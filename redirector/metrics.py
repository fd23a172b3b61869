"""A node's status as Prometheus metrics: names and labels by Prometheus' conventions. Pure.

https://prometheus.io/docs/practices/naming/ ; the list is in docs/operations.md.
"""

from collections import Counter as Count
from collections.abc import Iterable, Iterator
from importlib import metadata

from prometheus_client import exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from redirector.datapath.layout import Counter
from redirector.model import Mode
from redirector.status import NodeStatus, Outcome, PodStatus, defect_names

#: The Content-Type of what `render` answers.
CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST
_POD = ("namespace", "pod")
#: Of the buckets, every second one from 16 µs to 16.8 s: a series each, for every pod.
_BOUNDS = frozenset(2**exponent / 1e6 for exponent in range(4, 26, 2))


def render(status: NodeStatus, others: Iterable[Metric] = ()) -> bytes:
    """The text format of Prometheus; `others` are families of whoever serves it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once([*families(status), *others]))
    return exposition.generate_latest(registry)


def families(status: NodeStatus) -> Iterator[Metric]:
    """Every metric family of a node."""
    yield _build_info()
    yield from _pods(status)
    yield from _connections(status)
    yield from _latency(status)
    yield from _short_circuit(status)
    yield from _events(status)
    yield from _maps(status)


class _Once(Collector):
    """What has been collected already."""

    def __init__(self, collected: list[Metric]) -> None:
        self._collected = collected

    def collect(self) -> list[Metric]:
        return self._collected


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


def _pods(status: NodeStatus) -> Iterator[Metric]:
    pods = GaugeMetricFamily(
        "redirector_pods",
        "Enrolled pods by mode and by whether their connections are short-circuited",
        labels=("mode", "accelerated"),
    )
    numbers = Count((pod.pod.mode, pod.accelerated) for pod in status.pods)
    for mode, accelerated in ((Mode.EBPF, True), (Mode.EBPF, False), (Mode.IPTABLES, False)):
        pods.add_metric([mode, str(accelerated).lower()], numbers[mode, accelerated])
    yield pods
    missing = GaugeMetricFamily(
        "redirector_pod_missing_parts",
        "What the kernel lacks of an enrolled pod: hooks, rules, its namespace; 0 when whole",
        labels=_POD,
    )
    for pod in status.pods:
        missing.add_metric(_names(pod), len(pod.missing))
    yield missing
    defects = GaugeMetricFamily(
        "redirector_kernel_defect",
        "1 for each thing that this kernel does wrong with redirected bytes",
        labels=("defect",),
    )
    for name in defect_names(status.defects):
        defects.add_metric([name], 1)
    yield defects


def _connections(status: NodeStatus) -> Iterator[Metric]:
    connections = CounterMetricFamily(
        "redirector_connections",
        "Connections by verdict: steered to which listener, direct by which rule, refused and why",
        labels=(*_POD, "mode", "verdict", "reason"),
    )
    passed = CounterMetricFamily(
        "redirector_passed",
        "Sockets, or directions of a connection, left to TCP instead of short-circuited, and why",
        labels=(*_POD, "reason"),
    )
    withheld = CounterMetricFamily(
        "redirector_withheld_options",
        "Socket options that short-circuited sockets were not given",
        labels=(*_POD, "option"),
    )
    for pod in status.pods:
        for tally in pod.tallies:
            if tally.outcome is Outcome.PASSED:
                passed.add_metric([*_names(pod), tally.reason], tally.count)
            elif tally.outcome is Outcome.WITHHELD:
                withheld.add_metric([*_names(pod), tally.reason], tally.count)
            else:
                labels = [*_names(pod), pod.pod.mode, tally.outcome, tally.reason]
                connections.add_metric(labels, tally.count)
    yield connections
    yield passed
    yield withheld


def _latency(status: NodeStatus) -> Iterator[Metric]:
    family = HistogramMetricFamily(
        "redirector_connect_seconds",
        "Time from SYN to established of the connections that a pod opened (eBPF mode)",
        labels=(*_POD, "verdict"),
    )
    for pod in status.pods:
        for kind, latency in pod.latencies.items():
            bounds = [pair for pair in latency.cumulative() if pair[0] in _BOUNDS]
            buckets = [(str(bound), n) for bound, n in bounds]
            family.add_metric(
                [*_names(pod), kind.name.lower()],
                [*buckets, ("+Inf", latency.count)],
                latency.seconds,
            )
    yield family


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


def _short_circuit(status: NodeStatus) -> Iterator[Metric]:
    for counter, name, text in _SHORT_CIRCUIT:
        family = CounterMetricFamily(name, text, labels=_POD)
        for pod in status.pods:
            if counter in pod.counters:
                family.add_metric(_names(pod), pod.counters[counter])
        yield family


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
