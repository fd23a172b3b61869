"""What reaches a pod: judged by its policies, then handed to the application."""

from collections.abc import Sequence

from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2

from xds_server.ir import INBOUND_PORT, AppPort, Policy
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
from xds_server.translate.policies import http_filters, network_filters, per_route


def inbound_listener(ports: Sequence[AppPort], policies: Sequence[Policy]) -> listener_pb2.Listener:
    """A filter chain for each HTTP port. All others are TCP, known or not, and judged as such."""
    tcp = [*network_filters(policies), tcp_proxy(INBOUND)]
    return listener(
        INBOUND,
        INBOUND_PORT,
        (_http_chain(port, policies) for port in ports if port.protocol.is_http),
        chain(INBOUND, None, tcp),
    )


def inbound_routes(policies: Sequence[Policy]) -> route_pb2.RouteConfiguration:
    """Every request to where it was going, under the pod's policies."""
    host = route_components_pb2.VirtualHost(name="*", domains=["*"], routes=[catch_all(INBOUND)])
    result = route_pb2.RouteConfiguration(name=INBOUND, virtual_hosts=[host])
    result.validate_clusters.value = False
    for name, config in per_route(policies).items():
        result.typed_per_filter_config[name].CopyFrom(config)
    return result


def _http_chain(port: AppPort, policies: Sequence[Policy]) -> Chain:
    manager = http_manager(INBOUND, "localhost", http_filters())
    # The peer's address is appended to X-Forwarded-For, and no peer is trusted with Envoy's own
    # request headers.
    manager.use_remote_address.value = True
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
    return chain(f"{INBOUND}|{port.number}", port.number, [network_filter("http", manager)])
