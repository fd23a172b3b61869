"""What reaches a pod: judged by its policies, then handed to the application."""

from collections.abc import Mapping, Sequence

from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2

from xds_server.ir import INBOUND_PORT, AppPort, Policy, TrafficPolicy
from xds_server.translate.access_logs import access_logs
from xds_server.translate.clusters import INBOUND
from xds_server.translate.listeners import (
    Chain,
    Manager,
    catch_all,
    chain,
    http_manager,
    listener,
    network_filter,
    tcp_proxy,
)
from xds_server.translate.policies import form, http_filters, network_filters, per_route
from xds_server.translate.traffic import (
    configure,
    connection_filters,
    inbound_filters,
)


def inbound_listener(
    ports: Sequence[AppPort], policies: Sequence[Policy], traffic: Mapping[int, TrafficPolicy]
) -> listener_pb2.Listener:
    """A filter chain for each HTTP port, and for others with traffic policies. All the rest is TCP,
    known or not, and judged as such."""
    chains = [
        _http_chain(port, policies, traffic.get(port.number))
        if port.protocol.is_http
        else _tcp_chain(port.number, policies, traffic[port.number])
        for port in ports
        if port.protocol.is_http or port.number in traffic
    ]
    return listener(INBOUND, INBOUND_PORT, chains, _tcp_chain(None, policies, None))


def inbound_routes(policies: Sequence[Policy]) -> route_pb2.RouteConfiguration:
    """Every request to where it was going, under the pod's policies."""
    host = route_components_pb2.VirtualHost(name="*", domains=["*"], routes=[catch_all(INBOUND)])
    result = route_pb2.RouteConfiguration(name=INBOUND, virtual_hosts=[host])
    result.validate_clusters.value = False
    # Whoever X-Forwarded-For claims to be first; the application sees that itself.
    result.request_headers_to_remove.append("x-envoy-external-address")
    configure(result, per_route(policies))
    return result


def _chain_name(port: int | None) -> str:
    return INBOUND if port is None else f"{INBOUND}|{port}"


def _tcp_chain(
    port: int | None, policies: Sequence[Policy], traffic: TrafficPolicy | None
) -> Chain:
    filters = [
        *network_filters(),
        *connection_filters(traffic, port, http=False),
        tcp_proxy(INBOUND, access_logs(traffic)),
    ]
    result = chain(_chain_name(port), port, filters)
    # Open connections are under the rules of when they came. A policy that is edited replaces the
    # chain, which closes them after Envoy's drain time; what it comes to for pods does not.
    result.metadata.filter_metadata["redirector"].update({"policies": form(policies)})
    return result


def _http_chain(port: AppPort, policies: Sequence[Policy], traffic: TrafficPolicy | None) -> Chain:
    filters = [*http_filters(), *inbound_filters(traffic)]
    manager = http_manager(INBOUND, "localhost", filters)
    manager.access_log.extend(access_logs(traffic))
    # The peer's address is appended to X-Forwarded-For, and no peer is trusted with Envoy's own
    # request headers. X-Forwarded-Proto stays, which an ingress set that took TLS off: Envoy would
    # write "http" there if it did not count a proxy before itself. Policies judge the peer itself.
    manager.use_remote_address.value = True
    manager.xff_num_trusted_hops = 1
    manager.internal_address_config.SetInParent()
    manager.preserve_external_request_id = True
    if any(policy.judges_paths for policy in policies):
        # A path must not be spelt so that a policy misses it and the application does not.
        # Where nobody judges paths they pass as they are.
        manager.normalize_path.value = True
        manager.merge_slashes = True
        manager.path_with_escaped_slashes_action = (
            Manager.PathWithEscapedSlashesAction.UNESCAPE_AND_REDIRECT
        )
    found = [*connection_filters(traffic, port.number, http=True), network_filter("http", manager)]
    return chain(_chain_name(port.number), port.number, found)
