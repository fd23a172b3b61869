"""What services and pods come to, with all that is known of them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

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
        # As kube-proxy does.
        usable = _usable(ready[port.number], serving[port.number], raw.local)
        where = sorted(usable, key=lambda at: (*address_key(at[0]), at[1]))
        found = [usable[place] for place in where]
        near = _meant_for([e.hints for e in found], [e.zone for e in found], raw.same_zone)
        nodes = _meant_for([e.node_hints for e in found], [e.node for e in found], raw.same_node)
        if raw.local:
            near, nodes = [()] * len(found), [_known(e.node) for e in found]
        chosen = tuple(
            Endpoint(address, number, one.zone if zones or hosts else "", zones, hosts)
            for (address, number), one, zones, hosts in zip(where, found, near, nodes, strict=True)
        )
        ports.append(ServicePort(port.number, protocols[port], chosen))
    endpoints = [endpoint for port in ports for endpoint in port.endpoints]
    return Service(
        raw.name,
        raw.addresses,
        tuple(ports),
        raw.external,
        raw.affinity,
        tuple(sorted({zone for endpoint in endpoints for zone in endpoint.near})),
        tuple(sorted({node for endpoint in endpoints for node in endpoint.nodes})),
        raw.local,
    )


def _usable(
    ready: Mapping[_Place, SliceEndpoint], serving: Mapping[_Place, SliceEndpoint], local: bool
) -> Mapping[_Place, SliceEndpoint]:
    """With none ready those that still serve while they end; where clients have nothing but their
    own node's endpoints, with none ready there."""
    if not local:
        return ready or serving
    served = {endpoint.node for endpoint in ready.values()}
    ending = {place: one for place, one in serving.items() if one.node not in served}
    return {**ending, **ready}


def _meant_for(
    hints: Sequence[tuple[str, ...]], own: Sequence[str], wished: bool
) -> list[tuple[str, ...]]:
    """For each endpoint, the places whose clients it is meant for. Hints count if every endpoint
    has some (kube-proxy, CategorizeEndpoints); else its own place does, where the service wishes
    so."""
    if all(hints):
        return [tuple(sorted(hint)) for hint in hints]
    return [_known(place) if wished else () for place in own]


def _known(place: str) -> tuple[str, ...]:
    return (place,) if place else ()


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
        pod.node,
    )
