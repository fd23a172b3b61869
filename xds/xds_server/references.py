"""Which other resources a resource needs: the edges along which a snapshot must be whole. Pure."""

from collections.abc import Iterator
from typing import NamedTuple

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.extension_pb2 import TypedExtensionConfig
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as manager_pb2,
)
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from google.protobuf.message import Message

_PREFIX = "type.googleapis.com/"
CLUSTER = _PREFIX + Cluster.DESCRIPTOR.full_name
ENDPOINT = _PREFIX + ClusterLoadAssignment.DESCRIPTOR.full_name
LISTENER = _PREFIX + Listener.DESCRIPTOR.full_name
ROUTE = _PREFIX + RouteConfiguration.DESCRIPTOR.full_name
#: A filter of a listener, when it comes on its own.
FILTER = _PREFIX + TypedExtensionConfig.DESCRIPTOR.full_name

#: Types whose resources name others.
REFERRING = (LISTENER, ROUTE, CLUSTER)

_KIND = {
    CLUSTER: "cluster",
    ENDPOINT: "endpoints",
    LISTENER: "listener",
    ROUTE: "route",
    FILTER: "filter",
}


def kind(type_url: str) -> str:
    """A type's short name for people: `cluster`, `endpoints`, `listener`, `route`, `filter`."""
    return _KIND.get(type_url) or type_url.rpartition(".")[2]


class Reference(NamedTuple):
    """A resource that another one names."""

    type_url: str
    name: str

    def __str__(self) -> str:
        return f"{kind(self.type_url)} {self.name!r}"


def references(message: Message) -> frozenset[Reference]:
    """Everything that `message` names and that this server must therefore serve.

    Clusters without EDS, inline route tables and cluster headers need nothing from us.
    """
    if isinstance(message, Cluster):
        return frozenset(_of_cluster(message))
    if isinstance(message, Listener):
        return frozenset(_of_listener(message))
    if isinstance(message, RouteConfiguration):
        return frozenset(_of_routes(message))
    return frozenset()


def _of_cluster(cluster: Cluster) -> Iterator[Reference]:
    if cluster.type == Cluster.EDS and cluster.eds_cluster_config.eds_config.HasField("ads"):
        yield Reference(ENDPOINT, cluster.eds_cluster_config.service_name or cluster.name)


def _of_listener(listener: Listener) -> Iterator[Reference]:
    api = listener.api_listener.api_listener
    if api.Is(manager_pb2.HttpConnectionManager.DESCRIPTOR):
        yield from _of_manager(manager_pb2.HttpConnectionManager.FromString(api.value))
    chains = list(listener.filter_chains)
    if listener.HasField("default_filter_chain"):
        chains.append(listener.default_filter_chain)
    for chain in chains:
        for entry in chain.filters:
            config = entry.typed_config
            if entry.config_discovery.config_source.HasField("ads"):
                yield Reference(FILTER, entry.name)
            if config.Is(manager_pb2.HttpConnectionManager.DESCRIPTOR):
                yield from _of_manager(manager_pb2.HttpConnectionManager.FromString(config.value))
            elif config.Is(TcpProxy.DESCRIPTOR):
                yield from _of_tcp(TcpProxy.FromString(config.value))


def _of_manager(manager: manager_pb2.HttpConnectionManager) -> Iterator[Reference]:
    if manager.HasField("rds"):
        yield Reference(ROUTE, manager.rds.route_config_name)
    elif manager.HasField("route_config"):
        yield from _of_routes(manager.route_config)


def _of_tcp(proxy: TcpProxy) -> Iterator[Reference]:
    if proxy.cluster:
        yield Reference(CLUSTER, proxy.cluster)
    for weighted in proxy.weighted_clusters.clusters:
        yield Reference(CLUSTER, weighted.name)


def _of_routes(config: RouteConfiguration) -> Iterator[Reference]:
    for host in config.virtual_hosts:
        for route in host.routes:
            action = route.route
            if action.cluster:
                yield Reference(CLUSTER, action.cluster)
            for weighted in action.weighted_clusters.clusters:
                if weighted.name:
                    yield Reference(CLUSTER, weighted.name)
            for mirror in action.request_mirror_policies:
                if mirror.cluster:
                    yield Reference(CLUSTER, mirror.cluster)
