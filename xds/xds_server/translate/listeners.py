"""What the outbound and the inbound listener have in common."""

from collections.abc import Iterable
from typing import TypeAlias

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import address_pb2, protocol_pb2
from envoy.config.listener.v3 import listener_components_pb2, listener_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.listener.original_dst.v3 import original_dst_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as hcm_pb2,
)
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.type.matcher.v3 import string_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from xds_server.ir import INBOUND_PORT, OUTBOUND_PORT
from xds_server.translate.clusters import BLACKHOLE
from xds_server.translate.messages import (
    MAX_HEADERS,
    NO_TIMEOUT,
    ads,
    packed,
    regex,
    socket_address,
)

Chain: TypeAlias = listener_components_pb2.FilterChain
Filter: TypeAlias = listener_components_pb2.Filter
Manager: TypeAlias = hcm_pb2.HttpConnectionManager

_WEBSOCKET = "websocket"
#: What ends before that does, or differs at one of its characters, or goes on after it.
_NOT_WEBSOCKET = "(?i)" + "|".join(
    [*(f"{_WEBSOCKET[:i]}(?:[^{c}].*)?" for i, c in enumerate(_WEBSOCKET)), f"{_WEBSOCKET}.+"]
)


def listener(
    name: str, port: int, chains: Iterable[Chain], default: Chain
) -> listener_pb2.Listener:
    """A listener that picks the filter chain by the connection's original destination."""
    address = address_pb2.Address(socket_address=socket_address("::", port, ipv4_compat=True))
    return listener_pb2.Listener(
        name=name,
        address=address,
        traffic_direction="OUTBOUND" if port == OUTBOUND_PORT else "INBOUND",
        listener_filters=[
            listener_components_pb2.ListenerFilter(
                name="original_dst", typed_config=packed(original_dst_pb2.OriginalDst())
            )
        ],
        filter_chains=[*blackholes(), *chains],
        default_filter_chain=default,
    )


def blackholes() -> list[Chain]:
    """Connections to the listeners' own ports: their original destination was lost or never there,
    and passing them on would lead back here."""
    return [
        chain(f"blackhole|{port}", port, [tcp_proxy(BLACKHOLE)])
        for port in (OUTBOUND_PORT, INBOUND_PORT)
    ]


def chain(name: str, port: int | None, filters: Iterable[Filter]) -> Chain:
    result = Chain(name=name, filters=filters)
    if port is not None:
        result.filter_chain_match.destination_port.value = port
    return result


def tcp_proxy(cluster: str, access_log: Iterable[accesslog_pb2.AccessLog] = ()) -> Filter:
    # Applications decide how long their connections may be idle.
    proxy = tcp_proxy_pb2.TcpProxy(
        stat_prefix=stat_prefix(cluster),
        cluster=cluster,
        idle_timeout=NO_TIMEOUT,
        access_log=access_log,
    )
    return network_filter("tcp_proxy", proxy)


def network_filter(name: str, config: Message) -> Filter:
    return Filter(name=name, typed_config=packed(config))


def http_manager(
    route_config: str, default_host: str, filters: Iterable[hcm_pb2.HttpFilter] = ()
) -> Manager:
    """A connection manager that changes as little as it can of what passes through it; its routes
    come by RDS."""
    router = router_pb2.Router(suppress_envoy_headers=True)
    return Manager(
        stat_prefix=stat_prefix(route_config),
        rds=hcm_pb2.Rds(config_source=ads(), route_config_name=route_config),
        http_filters=[*filters, hcm_pb2.HttpFilter(name="router", typed_config=packed(router))],
        server_header_transformation=Manager.ServerHeaderTransformation.PASS_THROUGH,
        http_protocol_options=protocol_pb2.Http1ProtocolOptions(
            accept_http_10=True,
            default_host_for_http_10=default_host,
            allow_custom_methods=True,
            # An offer that nobody here takes up is none (RFC 9110, 7.8); Envoy would answer 403.
            ignore_http_11_upgrade=[string_pb2.StringMatcher(safe_regex=regex(_NOT_WEBSOCKET))],
        ),
        upgrade_configs=[Manager.UpgradeConfig(upgrade_type=_WEBSOCKET)],
        stream_idle_timeout=NO_TIMEOUT,
        common_http_protocol_options=protocol_pb2.HttpProtocolOptions(
            idle_timeout=NO_TIMEOUT, max_headers_count={"value": MAX_HEADERS}
        ),
        # A client that reads up to the end of the connection waits for this long.
        delayed_close_timeout=Duration(nanos=100_000_000),
    )


def stat_prefix(name: str) -> str:
    """Dots would cut the name into pieces."""
    return name.replace(".", "_").replace("|", "_")


def catch_all(cluster: str) -> route_components_pb2.Route:
    """Every request to one cluster, for as long as it takes."""
    return route_components_pb2.Route(
        match=route_components_pb2.RouteMatch(prefix="/"),
        route=route_components_pb2.RouteAction(cluster=cluster, timeout=NO_TIMEOUT),
    )
