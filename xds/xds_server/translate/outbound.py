"""Where the application's own connections go: by service address and port, never by Host."""

from collections.abc import Iterable

from envoy.config.listener.v3 import listener_pb2

from xds_server.ir import OUTBOUND_PORT, Service, ServicePort
from xds_server.translate.clusters import BLACKHOLE, PASSTHROUGH, cluster_name
from xds_server.translate.listeners import (
    Chain,
    Manager,
    chain,
    http_manager,
    listener,
    network_filter,
    tcp_proxy,
)
from xds_server.translate.messages import cidr
from xds_server.translate.traffic import outbound_filters

OUTBOUND = "outbound"


def outbound_listener(
    services: Iterable[Service], *, closed: bool = False, headless: Iterable[Service] = ()
) -> listener_pb2.Listener:
    """A filter chain for each port of each service that has an address; the rest passes through, or
    if the mesh is closed nowhere, but for the endpoints of `headless` services."""
    services = tuple(services)
    return listener(
        OUTBOUND,
        OUTBOUND_PORT,
        [
            *(
                _service_chain(service, port)
                for service in services
                if service.addresses
                for port in service.ports
            ),
            *_endpoint_chains(headless, services),
        ],
        chain(BLACKHOLE, None, [tcp_proxy(BLACKHOLE)])
        if closed
        else chain(PASSTHROUGH, None, [tcp_proxy(PASSTHROUGH)]),
    )


def _endpoint_chains(headless: Iterable[Service], services: Iterable[Service]) -> Iterable[Chain]:
    """One for each place, so that connections to the others survive a change. What is a service's
    own has a chain already, and Envoy would refuse the listener for a second."""
    taken = {
        (address, port.number)
        for service in services
        for address in service.addresses
        for port in service.ports
    }
    places = {
        (str(endpoint.address), endpoint.port): endpoint
        for service in headless
        for port in service.ports
        for endpoint in port.endpoints
        if (endpoint.address, endpoint.port) not in taken
    }
    for (address, port), endpoint in sorted(places.items()):
        made = chain(f"{PASSTHROUGH}|{port}|{address}", port, [tcp_proxy(PASSTHROUGH)])
        made.filter_chain_match.prefix_ranges.append(cidr(endpoint.address))
        yield made


def _service_chain(service: Service, port: ServicePort) -> Chain:
    name = cluster_name(service.name, port.number)
    if port.protocol.is_http:
        host = f"{service.name.name}.{service.name.namespace}.svc.cluster.local"
        manager = http_manager(name, host, outbound_filters())
        # The application's X-Forwarded-For, if any, is its own matter.
        manager.skip_xff_append = True
        manager.codec_type = Manager.CodecType.AUTO
        filters = [network_filter("http", manager)]
    else:
        filters = [tcp_proxy(name)]
    result = chain(name, port.number, filters)
    result.filter_chain_match.prefix_ranges.extend(cidr(address) for address in service.addresses)
    return result
