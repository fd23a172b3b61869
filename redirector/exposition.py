"""Metric families in the text format of Prometheus. Pure."""

from collections.abc import Iterable

from prometheus_client import exposition
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry


class _Families(Collector):
    """What has been collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def text(families: Iterable[Metric]) -> bytes:
    """Their lines, each family's HELP and TYPE before its samples."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return exposition.generate_latest(registry)
