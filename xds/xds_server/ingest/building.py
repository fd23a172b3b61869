"""What services and pods come to, with all that is known of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from redirector.model import IPAddress
from xds_server.ingest.core import (
    Pod,
    RawPort,
    RawService,
    Slice,
    SliceEndpoint,
    address_key,
    pairs,
)
from xds_server.ingest.scopes import NOTHING, Wishes
from xds_server.ir import (
    EVERYTHING,
    INBOUND_PORT,
    OUTBOUND_PORT,
    AppPort,
    Endpoint,
    Protocol,
    Service,
    ServicePort,
    Workload,
)

_Place = tuple[IPAddress, int]


def build_service(
    raw: RawService, slices: Iterable[Slice], protocols: Mapping[RawPort, Protocol]
) -> Service:
    """The service with the endpoints its slices (all those given) name."""
    ready: dict[int, dict[_Place, SliceEndpoint]] = defaultdict(dict)
    serving: dict[int, dict[_Place, SliceEndpoint]] = defaultdict(dict)
    for piece in slices:
        for port, number in pairs(raw, piece):
            for endpoint in piece.endpoints:
                places = ready if endpoint.ready else serving
                if endpoint.ready or endpoint.serving:
                    for address in endpoint.addresses:
                        places[port.number].setdefault((address, number), endpoint)
    ports = []
    for port in raw.ports:
        # As kube-proxy does: with none ready, those that still serve while they end.
        usable = ready[port.number] or serving[port.number]
        # Hints count if every endpoint has some (kube-proxy, CategorizeEndpoints).
        hinted = all(endpoint.hints for endpoint in usable.values())
        chosen = []
        for address, number in sorted(usable, key=lambda at: (*address_key(at[0]), at[1])):
            endpoint = usable[address, number]
            own = (endpoint.zone,) if raw.same_zone and endpoint.zone else ()
            near = tuple(sorted(endpoint.hints)) if hinted else own
            chosen.append(Endpoint(address, number, endpoint.zone if near else "", near))
        ports.append(ServicePort(port.number, protocols[port], tuple(chosen)))
    zones = {zone for port in ports for endpoint in port.endpoints for zone in endpoint.near}
    return Service(
        raw.name, raw.addresses, tuple(ports), raw.external, raw.affinity, tuple(sorted(zones))
    )


def build_workload(
    pod: Pod,
    served: Iterable[tuple[RawPort, int]],
    protocols: Mapping[RawPort, Protocol],
    zone: str = "",
    wishes: Wishes = NOTHING,
) -> Workload:
    """The pod with what it listens on. A port is TCP if anything declares it so (Envoy must not
    parse it), else HTTP if anything declares or routes it as HTTP."""
    seen: dict[int, set[Protocol | None]] = defaultdict(set)
    for number, declared in pod.ports:
        seen[number].add(declared)
    for port, number in served:
        if number in (OUTBOUND_PORT, INBOUND_PORT):
            continue
        assumed = port.declared is None and protocols[port] is Protocol.TCP
        seen[number].add(None if assumed else protocols[port])
    order = (Protocol.TCP, Protocol.HTTP2, Protocol.HTTP)
    ports = (
        AppPort(number, next((p for p in order if p in seen[number]), Protocol.TCP))
        for number in sorted(seen)
    )
    return Workload(
        pod.name,
        pod.addresses,
        tuple(ports),
        pod.service_account,
        zone,
        wishes.scope or EVERYTHING,
        bool(wishes.closed),
    )
