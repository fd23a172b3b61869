"""The server's numbers as Prometheus has them."""

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from redirector.exposition import text
from xds_server.admission import Admission, Reason
from xds_server.hub import Hub
from xds_server.tally import Distribution

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(hub: Hub, admission: Admission) -> bytes:
    """The text format. Nothing is labelled by sidecar or by what clients say."""
    return text(_families(hub, admission))


def _families(hub: Hub, admission: Admission) -> Iterator[Metric]:
    tally = hub.tally
    yield _gauge("clients", "Sidecars that are connected", len(hub.connections))
    yield _counter(
        "clients_refused",
        "Clients that were not served, and why",
        "reason",
        {reason: admission.refused[reason] for reason in Reason},
    )
    yield _gauge("mesh_objects", "Objects that were read last", tally.objects)
    yield _gauge("mesh_problems", "Mistakes in the objects that were read last", tally.problems)
    yield _gauge("source_up", "Whether the source of the objects answers", not tally.hindrances())
    yield CounterMetricFamily(
        "redirector_xds_encodings",
        "Resources that were serialized, for all sidecars together",
        value=hub.encodings,
    )
    yield _histogram(
        "push_seconds",
        "From a change of the objects to the last sidecar's answer",
        {"": tally.push_seconds},
    )
    yield CounterMetricFamily(
        "redirector_xds_pushes_unanswered",
        "Changes that some sidecar did not answer in time",
        value=tally.unanswered_pushes,
    )
    yield _histogram("ack_seconds", "From a response to its answer", tally.ack_seconds, "type")
    yield _histogram("response_bytes", "Size of responses", tally.response_bytes, "type")
    yield _counter("nacks", "Responses that a sidecar refused", "type", tally.nacks)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"redirector_xds_{name}", what, value=value)


def _counter(name: str, what: str, label: str, values: Mapping[str, int] | Counter[str]) -> Metric:
    family = CounterMetricFamily(f"redirector_xds_{name}", what, labels=(label,))
    for value, number in sorted(values.items()):
        family.add_metric([value], number)
    return family


def _histogram(
    name: str, what: str, values: Mapping[str, Distribution], label: str | None = None
) -> Metric:
    family = HistogramMetricFamily(f"redirector_xds_{name}", what, labels=(label,) if label else ())
    for value, found in sorted(values.items()):
        family.add_metric([value] if label else [], found.buckets(), found.sum)
    return family
