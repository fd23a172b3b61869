"""The gRPC methods by which resources are served: all types on one stream, or one type on each.

Source: envoy/service/{discovery/v3/ads,cluster/v3/cds,endpoint/v3/eds,listener/v3/lds,
route/v3/rds,extension/v3/config_discovery}.proto.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from xds_server.delta import DeltaStream
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE
from xds_server.sotw import SotwStream

AGGREGATED = "envoy.service.discovery.v3.AggregatedDiscoveryService"
Variant = type[DeltaStream | SotwStream]


@dataclass(frozen=True)
class Method:
    """A method of a service; `only` is the type URL that it serves, or "" for all."""

    service: str
    name: str
    variant: Variant
    only: str = ""

    def stream(self) -> DeltaStream | SotwStream:
        """The state machine of a new call."""
        return self.variant(only=self.only)


_PER_TYPE = {
    CLUSTER: ("cluster", "Cluster", "Clusters"),
    ENDPOINT: ("endpoint", "Endpoint", "Endpoints"),
    LISTENER: ("listener", "Listener", "Listeners"),
    ROUTE: ("route", "Route", "Routes"),
    FILTER: ("extension", "ExtensionConfig", "ExtensionConfigs"),
}


def _methods() -> Iterator[Method]:
    yield Method(AGGREGATED, "DeltaAggregatedResources", DeltaStream)
    yield Method(AGGREGATED, "StreamAggregatedResources", SotwStream)
    for type_url, (package, service, resources) in _PER_TYPE.items():
        name = f"envoy.service.{package}.v3.{service}DiscoveryService"
        yield Method(name, f"Delta{resources}", DeltaStream, type_url)
        yield Method(name, f"Stream{resources}", SotwStream, type_url)


#: Every method that is served, those of a service beside each other.
METHODS = tuple(_methods())
