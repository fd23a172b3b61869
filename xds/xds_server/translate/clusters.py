"""Clusters and their endpoints: the same for every sidecar."""

from collections.abc import Iterable, Mapping

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2
from envoy.config.core.v3 import protocol_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.extensions.clusters.common.dns.v3 import dns_pb2
from envoy.extensions.clusters.dns.v3 import dns_cluster_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from xds_server.ir import (
    Balancing,
    Endpoint,
    LoadBalancer,
    Name,
    Parent,
    Protocol,
    Service,
    SourceHash,
    TrafficPolicy,
)
from xds_server.translate.endpoints import balance, shape
from xds_server.translate.messages import MAX_HEADERS, ads, packed, socket_address

PASSTHROUGH = "passthrough"
INBOUND = "inbound"
BLACKHOLE = "blackhole"
#: The type of clusters whose endpoints Envoy finds by name.
RESOLVED = "envoy.cluster.dns"

#: What the datapath knows the sidecar's own connections to its application by.
INBOUND_SOURCE_IPV4 = "127.0.0.6"
INBOUND_SOURCE_IPV6 = "::6"

#: Kubernetes' sessionAffinity: what a client sends goes to one endpoint.
_BY_CLIENT = LoadBalancer(Balancing.MAGLEV, (SourceHash(),))

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UNLIMITED = 2**32 - 1
#: A connection to the application that nobody uses for so long is closed by the sidecar. If the
#: application did so first, as many do after 2 to 5 s, a request could be on its way already, and
#: would be answered with 503.
_APPLICATION_IDLE = Duration(seconds=1)


def cluster_name(service: Name, port: int) -> str:
    return f"outbound|{port}|{service.name}.{service.namespace}"


def outbound_clusters(
    services: Iterable[Service], traffic: Mapping[Parent, TrafficPolicy]
) -> dict[str, Message]:
    """A cluster for each service port, with its endpoints to be asked for over ADS, or for Envoy to
    resolve."""
    found: dict[str, Message] = {}
    for service in services:
        for port in service.ports:
            name = cluster_name(service.name, port.number)
            if service.hostname:
                cluster = _resolved(name, service.hostname, port.number)
            else:
                cluster = _cluster(name, cluster_pb2.Cluster.DiscoveryType.EDS)
                cluster.eds_cluster_config.eds_config.CopyFrom(ads())
            cluster.lb_policy = cluster_pb2.Cluster.LbPolicy.LEAST_REQUEST
            _speak(cluster, port.protocol)
            if service.affinity:
                balance(cluster, _BY_CLIENT)
            shape(cluster, traffic.get(Parent(service.name, port.number)))
            found[name] = cluster
    return found


def outbound_endpoints(
    services: Iterable[Service], zone: str = "", node: str = ""
) -> dict[str, Message]:
    """An assignment for each of `outbound_clusters` that asks for one, for clients of a zone and a
    node; without it Envoy would warm the cluster for ever."""
    found: dict[str, Message] = {}
    for service in services:
        for port in service.ports if not service.hostname else ():
            name = cluster_name(service.name, port.number)
            assignment = endpoint_pb2.ClusterLoadAssignment(cluster_name=name)
            reached = [e for e in port.endpoints if not service.local or (node and node in e.nodes)]
            for (priority, where), endpoints in sorted(_groups(reached, zone, node).items()):
                group = assignment.endpoints.add(priority=priority)
                if where:
                    group.locality.zone = where
                for endpoint in endpoints:
                    # Filled in where it stands: to copy messages into it takes thrice as long.
                    at = group.lb_endpoints.add().endpoint.address.socket_address
                    at.address, at.port_value = str(endpoint.address), endpoint.port
            found[name] = assignment
    return found


def _groups(
    endpoints: Iterable[Endpoint], zone: str, node: str
) -> dict[tuple[int, str], list[Endpoint]]:
    """By priority and zone. What is meant for others is there for when nothing else is left."""
    tiers: tuple[list[Endpoint], ...] = ([], [], [])
    for endpoint in endpoints:
        distance = 0 if node in endpoint.nodes else 1 if zone in endpoint.near else 2
        tiers[distance].append(endpoint)
    groups: dict[tuple[int, str], list[Endpoint]] = {}
    for priority, chosen in enumerate(tier for tier in tiers if tier):
        for endpoint in chosen:
            groups.setdefault((priority, endpoint.zone), []).append(endpoint)
    return groups


def _resolved(name: str, hostname: str, port: int) -> cluster_pb2.Cluster:
    """A cluster whose endpoints Envoy finds by itself, by name."""
    cluster = _cluster(name, cluster_pb2.Cluster.DiscoveryType.STATIC)
    how = dns_cluster_pb2.DnsCluster(
        respect_dns_ttl=True, dns_lookup_family=dns_pb2.DnsLookupFamily.V4_PREFERRED
    )
    cluster.cluster_type.name = RESOLVED
    cluster.cluster_type.typed_config.CopyFrom(packed(how))
    endpoint = cluster.load_assignment.endpoints.add().lb_endpoints.add().endpoint
    endpoint.address.socket_address.CopyFrom(socket_address(hostname, port))
    cluster.load_assignment.cluster_name = name
    return cluster


def fixed_clusters() -> dict[str, Message]:
    """What every sidecar has, whatever the mesh: onwards to where the application wanted to go, to
    the application itself, and nowhere."""
    passthrough = _original_destination(PASSTHROUGH)
    inbound = _original_destination(INBOUND)
    _speak(inbound, Protocol.HTTP, _APPLICATION_IDLE)
    inbound.upstream_bind_config.source_address.CopyFrom(socket_address(INBOUND_SOURCE_IPV4, 0))
    # Envoy takes the first one of the destination's own family.
    inbound.upstream_bind_config.extra_source_addresses.add().address.CopyFrom(
        socket_address(INBOUND_SOURCE_IPV6, 0)
    )
    blackhole = _cluster(BLACKHOLE, cluster_pb2.Cluster.DiscoveryType.STATIC)
    return {BLACKHOLE: blackhole, INBOUND: inbound, PASSTHROUGH: passthrough}


def _cluster(name: str, kind: cluster_pb2.Cluster.DiscoveryType) -> cluster_pb2.Cluster:
    return cluster_pb2.Cluster(
        name=name,
        type=kind,
        connect_timeout=Duration(seconds=10),
        # Without a sidecar there would be no limit either; Envoy's default is 1,024 of each.
        circuit_breakers=circuit_breaker_pb2.CircuitBreakers(
            thresholds=[
                {
                    "max_connections": {"value": _UNLIMITED},
                    "max_pending_requests": {"value": _UNLIMITED},
                    "max_requests": {"value": _UNLIMITED},
                    "max_retries": {"value": _UNLIMITED},
                }
            ]
        ),
    )


def _original_destination(name: str) -> cluster_pb2.Cluster:
    cluster = _cluster(name, cluster_pb2.Cluster.DiscoveryType.ORIGINAL_DST)
    cluster.lb_policy = cluster_pb2.Cluster.LbPolicy.CLUSTER_PROVIDED
    # A destination stays known for as long as connections to it come at least this often.
    cluster.cleanup_interval.seconds = 30
    return cluster


def _speak(cluster: cluster_pb2.Cluster, protocol: Protocol, idle: Duration | None = None) -> None:
    """HTTP is spoken as the client speaks it (1.1 or 2), HTTP2 always as HTTP/2."""
    options = http_protocol_options_pb2.HttpProtocolOptions
    http2 = protocol_pb2.Http2ProtocolOptions()
    match protocol:
        case Protocol.HTTP:
            chosen = options(
                use_downstream_protocol_config=options.UseDownstreamHttpConfig(
                    http_protocol_options=protocol_pb2.Http1ProtocolOptions(),
                    http2_protocol_options=http2,
                )
            )
        case Protocol.HTTP2:
            chosen = options(
                explicit_http_config=options.ExplicitHttpConfig(http2_protocol_options=http2)
            )
        case Protocol.TCP:
            return
    chosen.common_http_protocol_options.max_headers_count.value = MAX_HEADERS
    if idle is not None:
        chosen.common_http_protocol_options.idle_timeout.CopyFrom(idle)
    cluster.typed_extension_protocol_options[_HTTP_OPTIONS].CopyFrom(packed(chosen))
