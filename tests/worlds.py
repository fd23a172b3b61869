"""Small consistent sets of Envoy resources for the tests of the ADS side."""

from collections.abc import Mapping

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3.extension_pb2 import TypedExtensionConfig
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.http.router.v3.router_pb2 import Router
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as manager_pb2,
)
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from google.protobuf.message import Message
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE

Resources = Mapping[str, Mapping[str, Message]]


def cluster(name: str, variant: int = 0) -> Cluster:
    """An EDS cluster over ADS; each variant differs."""
    made = Cluster(name=name, type=Cluster.EDS)
    made.connect_timeout.seconds = 1 + variant
    made.eds_cluster_config.eds_config.ads.SetInParent()
    made.eds_cluster_config.eds_config.resource_api_version = 2
    return made


def endpoints(name: str, port: int = 8000) -> ClusterLoadAssignment:
    """One endpoint on loopback."""
    made = ClusterLoadAssignment(cluster_name=name)
    place = made.endpoints.add().lb_endpoints.add().endpoint.address.socket_address
    place.address, place.port_value = "127.0.0.1", port
    return made


def route(name: str, target: str, variant: int = 0) -> RouteConfiguration:
    """Everything to one cluster; each variant differs."""
    made = RouteConfiguration(name=name)
    host = made.virtual_hosts.add(name="all", domains=["*"])
    entry = host.routes.add()
    entry.match.prefix = "/"
    entry.route.cluster = target
    entry.route.timeout.seconds = 1 + variant
    return made


def network_filter(name: str, variant: int = 0) -> TypedExtensionConfig:
    """A filter that comes on its own; each variant differs."""
    made = TypedExtensionConfig(name=name)
    made.typed_config.Pack(TcpProxy(stat_prefix=str(variant)), deterministic=True)
    return made


def listener(name: str, route_name: str, variant: int = 0, filter_name: str = "") -> Listener:
    """An HTTP listener on a free loopback port with its routes from RDS, and its filter from ECDS
    if it has one."""
    manager = manager_pb2.HttpConnectionManager(stat_prefix=f"{name}{variant}")
    manager.rds.route_config_name = route_name
    manager.rds.config_source.ads.SetInParent()
    manager.rds.config_source.resource_api_version = 2
    router = manager.http_filters.add(name="router")
    router.typed_config.Pack(Router(), deterministic=True)
    made = Listener(name=name)
    made.address.socket_address.address = "127.0.0.1"
    made.address.socket_address.port_value = 0
    filters = made.filter_chains.add().filters
    if filter_name:
        discovery = filters.add(name=filter_name).config_discovery
        discovery.config_source.ads.SetInParent()
        discovery.config_source.resource_api_version = 2
        discovery.type_urls.append(TcpProxy.DESCRIPTOR.full_name)
    entry = filters.add(name="http")
    entry.typed_config.Pack(manager, deterministic=True)
    return made


def world(
    clusters: Mapping[str, int] | None = None,
    ports: Mapping[str, int] | None = None,
    routes: Mapping[str, tuple[str, int]] | None = None,
    listeners: Mapping[str, tuple[str, int]] | None = None,
) -> Resources:
    """Clusters (name -> variant), their ports, routes (name -> cluster, variant), listeners
    (name -> route, variant). Every cluster has its endpoints."""
    clusters = {"web": 0} if clusters is None else clusters
    routes = {"to-web": ("web", 0)} if routes is None else routes
    listeners = {"in": ("to-web", 0)} if listeners is None else listeners
    ports = ports or {}
    return {
        CLUSTER: {n: cluster(n, v) for n, v in sorted(clusters.items())},
        ENDPOINT: {n: endpoints(n, ports.get(n, 8000)) for n in sorted(clusters)},
        LISTENER: {n: listener(n, r, v) for n, (r, v) in sorted(listeners.items())},
        ROUTE: {n: route(n, c, v) for n, (c, v) in sorted(routes.items())},
        FILTER: {},
    }
