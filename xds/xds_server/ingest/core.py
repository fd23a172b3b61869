"""Pods, Services and EndpointSlices: what listens where."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from redirector.model import IPAddress
from xds_server.ingest.reader import Field, Item
from xds_server.ir import (
    INBOUND_PORT,
    OUTBOUND_PORT,
    AppPort,
    Endpoint,
    Name,
    Protocol,
    Service,
    ServicePort,
    Workload,
)

SERVICE_NAME = "kubernetes.io/service-name"

#: Names used as appProtocol (also with the kubernetes.io/ prefix) and, up to the first dash, as
#: port names.
_PROTOCOLS = {
    "http": Protocol.HTTP,
    "http1": Protocol.HTTP,
    "ws": Protocol.HTTP,
    "grpc-web": Protocol.HTTP,
    "http2": Protocol.HTTP2,
    "h2c": Protocol.HTTP2,
    "grpc": Protocol.HTTP2,
    "tcp": Protocol.TCP,
    "https": Protocol.TCP,
    "tls": Protocol.TCP,
    "wss": Protocol.TCP,
}


@dataclass(frozen=True, eq=False)
class Pod:
    """`ports` are those its containers declare, with the protocol they declare, if any."""

    name: Name
    labels: Mapping[str, str]
    service_account: str
    addresses: tuple[IPAddress, ...]
    host_network: bool
    ports: tuple[tuple[int, Protocol | None], ...]

    def uncertain(self) -> "Pod":
        """Of one that cannot be read: what it listens on is not known, and its addresses, if they
        are its own, allow nothing."""
        return replace(self, host_network=True, ports=())


@dataclass(frozen=True, eq=False)
class SlicePort:
    name: str
    number: int


@dataclass(frozen=True, eq=False)
class SliceEndpoint:
    addresses: tuple[IPAddress, ...]
    pod: Name | None
    ready: bool
    serving: bool


@dataclass(frozen=True, eq=False)
class Slice:
    service: Name
    ports: tuple[SlicePort, ...]
    endpoints: tuple[SliceEndpoint, ...]

    def without_ports(self) -> "Slice":
        return replace(self, ports=())


@dataclass(frozen=True, eq=False)
class RawPort:
    """`declared` is None when the port says nothing of its protocol."""

    name: str
    number: int
    declared: Protocol | None


@dataclass(frozen=True, eq=False)
class RawService:
    name: Name
    item: Item
    addresses: tuple[IPAddress, ...]
    selector: Mapping[str, str]
    external: bool
    ports: tuple[RawPort, ...]

    def port(self, number: int) -> RawPort | None:
        return next((port for port in self.ports if port.number == number), None)

    def without(self, lost: Mapping[Name, frozenset[IPAddress]]) -> "RawService":
        """Without the addresses that belong to another object."""
        if self.name not in lost:
            return self
        gone = lost[self.name]
        return replace(self, addresses=tuple(a for a in self.addresses if a not in gone))

    def without_ports(self) -> "RawService":
        return replace(self, ports=())


def read_pod(item: Item) -> Pod | None:
    """None for a pod that has ended: its address may belong to another one by now."""
    status, spec = item.root["status"], item.spec
    if status["phase"].text("") in ("Succeeded", "Failed"):
        return None
    addresses = [entry["ip"].address() for entry in status["podIPs"].items()]
    if status["podIP"].present:
        addresses.append(status["podIP"].address())
    ports: dict[int, Protocol | None] = {}
    # A sidecar may be listed among the init containers (restartPolicy Always).
    for container in spec["containers"].items() + spec["initContainers"].items():
        for port in container["ports"].items():
            number = port["containerPort"].port()
            if _is_tcp(port) and number not in (OUTBOUND_PORT, INBOUND_PORT):
                ports[number] = protocol_of("", port["name"].text(""))
    return Pod(
        item.name,
        item.root["metadata"]["labels"].labels(),
        spec["serviceAccountName"].text("default"),
        tuple(sorted({a for a in addresses if a is not None}, key=_address_key)),
        spec["hostNetwork"].boolean(False),
        tuple(sorted(ports.items())),
    )


def read_service(item: Item) -> RawService:
    spec = item.spec
    given = spec["clusterIPs"].items() or [spec["clusterIP"]]
    addresses = [
        field.address() for field in given if field.present and field.value not in ("", "None")
    ]
    ports: list[RawPort] = []
    for field in spec["ports"].items():
        number, name = field["port"].port(), field["name"].text("")
        if isinstance(field["targetPort"].value, int):
            field["targetPort"].port()
        if not _is_tcp(field) or number != field["port"].value:
            continue
        if any(number == port.number for port in ports):
            field["port"].problem("is given twice; give each port of a service its own number")
            continue
        if any(name == port.name for port in ports):
            field["name"].problem("must be there and differ between the ports of a service")
        ports.append(RawPort(name, number, protocol_of(field["appProtocol"].text(""), name)))
    return RawService(
        item.name,
        item,
        tuple(sorted({a for a in addresses if a is not None}, key=_address_key)),
        spec["selector"].labels(),
        spec["type"].text("ClusterIP") == "ExternalName",
        tuple(sorted(ports, key=lambda port: port.number)),
    )


def read_slice(item: Item) -> Slice | None:
    """None for one that belongs to no service."""
    service = item.root["metadata"]["labels"][SERVICE_NAME].text("")
    if item.root["addressType"].text() not in ("IPv4", "IPv6"):
        item.root["addressType"].problem("must be IPv4 or IPv6")
        return None
    ports = []
    for port in item.root["ports"].items():
        if _is_tcp(port) and port["port"].present:
            ports.append(SlicePort(port["name"].text(""), port["port"].port()))
    endpoints = []
    for endpoint in item.root["endpoints"].items():
        addresses = [field.address() for field in endpoint["addresses"].filled("name an address")]
        target, conditions = endpoint["targetRef"], endpoint["conditions"]
        pod = None
        if target["kind"].text("") == "Pod":
            namespace = target["namespace"].namespace(item.name.namespace)
            pod = Name(namespace, target["name"].text())
        ready = conditions["ready"].boolean(True)
        endpoints.append(
            SliceEndpoint(
                tuple(a for a in addresses if a is not None),
                pod,
                ready,
                conditions["serving"].boolean(ready),
            )
        )
    if not service:
        return None
    return Slice(Name(item.name.namespace, service), tuple(ports), tuple(endpoints))


def protocol_of(app_protocol: str, port_name: str) -> Protocol | None:
    """What a port declares; appProtocol beats the name. An appProtocol we do not know is somebody's
    own protocol, so TCP to us."""
    if app_protocol:
        plain = app_protocol.lower().removeprefix("kubernetes.io/")
        return _PROTOCOLS.get(plain, Protocol.TCP)
    word = port_name.split("-")[0]
    return _PROTOCOLS.get(word, Protocol.HTTP if word.startswith("http") else None)


class Members:
    """Which pods stand behind which service, ready or not."""

    def __init__(
        self, pods: Collection[Pod], services: Iterable[RawService], slices: Iterable[Slice]
    ) -> None:
        by_address: dict[IPAddress, set[Name]] = defaultdict(set)
        for pod in pods:
            for address in () if pod.host_network else pod.addresses:
                by_address[address].add(pod.name)
        self._pods: dict[Name, set[Name]] = defaultdict(set)
        self.ports: dict[Name, list[tuple[RawPort, int]]] = defaultdict(list)
        """For each pod, the service ports it serves, and on which port of its own."""
        known = {service.name: service for service in services}
        for piece in slices:
            for endpoint in piece.endpoints:
                members = set().union(*(by_address.get(a, ()) for a in endpoint.addresses))
                if endpoint.pod is not None:
                    members.add(endpoint.pod)
                # Nobody decides on protocols and policies of another namespace's pods.
                members = {pod for pod in members if pod.namespace == piece.service.namespace}
                self._pods[piece.service] |= members
                for port, number in _pairs(known.get(piece.service), piece):
                    for member in members:
                        self.ports[member].append((port, number))
        # Slices lag behind pods: a policy must hold from a pod's first moment.
        by_label: dict[tuple[str, str, str], list[Pod]] = defaultdict(list)
        for pod in pods:
            for key, value in pod.labels.items():
                by_label[pod.name.namespace, key, value].append(pod)
        for service in known.values():
            for key, value in list(service.selector.items())[:1]:
                for pod in by_label[service.name.namespace, key, value]:
                    if selects(service.selector, pod.labels):
                        self._pods[service.name].add(pod.name)

    def of(self, service: Name) -> frozenset[Name]:
        return frozenset(self._pods.get(service, ()))


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def build_service(
    raw: RawService, slices: Iterable[Slice], protocols: Mapping[RawPort, Protocol]
) -> Service:
    """The service with the endpoints its slices (all those given) name."""
    ready: dict[int, set[Endpoint]] = defaultdict(set)
    serving: dict[int, set[Endpoint]] = defaultdict(set)
    for piece in slices:
        for port, number in _pairs(raw, piece):
            for endpoint in piece.endpoints:
                places = {Endpoint(address, number) for address in endpoint.addresses}
                if endpoint.ready:
                    ready[port.number] |= places
                elif endpoint.serving:
                    serving[port.number] |= places
    ports = []
    for port in raw.ports:
        # As kube-proxy does: with none ready, those that still serve while they end.
        usable = ready[port.number] or serving[port.number]
        chosen = sorted(usable, key=lambda at: (*_address_key(at.address), at.port))
        ports.append(ServicePort(port.number, protocols[port], tuple(chosen)))
    return Service(raw.name, raw.addresses, tuple(ports))


def build_workload(
    pod: Pod, served: Iterable[tuple[RawPort, int]], protocols: Mapping[RawPort, Protocol]
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
    return Workload(pod.name, pod.addresses, tuple(ports), pod.service_account)


def _pairs(service: RawService | None, piece: Slice) -> list[tuple[RawPort, int]]:
    if service is None:
        return []
    by_name = {port.name: port for port in service.ports}
    return [(by_name[port.name], port.number) for port in piece.ports if port.name in by_name]


def _is_tcp(port: Field) -> bool:
    return port["protocol"].text("TCP") == "TCP"


def _address_key(address: IPAddress) -> tuple[int, int]:
    return address.version, int(address)
