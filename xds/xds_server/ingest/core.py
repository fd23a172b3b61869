"""Pods, Services and EndpointSlices: what listens where."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from redirector.model import IPAddress, Steering
from xds_server.ingest.reader import DNS_NAME, Field, Item
from xds_server.ingest.scopes import NOTHING, Wishes, read_pod_wishes
from xds_server.ir import (
    INBOUND_PORT,
    OUTBOUND_PORT,
    Name,
    Protocol,
)

SERVICE_NAME = "kubernetes.io/service-name"
ZONE = "topology.kubernetes.io/zone"

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


_ADMIN_PORT = 15000
#: Where a sidecar serves its administration, its listeners, its health and its metrics. Nobody
#: outside of the mesh is meant by them, and a name may resolve to the client itself.
_SIDECAR_PORTS = Steering.exclude_inbound_ports | {
    _ADMIN_PORT,
    OUTBOUND_PORT,
    INBOUND_PORT,
    Steering.dns_port,
}
_SAME_NODE = "PreferSameNode"
_SAME_ZONE = ("PreferClose", "PreferSameZone", _SAME_NODE)
_EXTERNAL = re.compile(rf"(?i:{DNS_NAME.pattern}\.?)")


class _Affinity(StrEnum):
    NONE = "None"
    CLIENT = "ClientIP"


class _Internal(StrEnum):
    CLUSTER = "Cluster"
    LOCAL = "Local"


@dataclass(frozen=True, eq=False)
class Pod:
    """`ports` are those its containers declare, with the protocol they declare, if any."""

    name: Name
    labels: Mapping[str, str]
    service_account: str
    addresses: tuple[IPAddress, ...]
    host_network: bool
    ports: tuple[tuple[int, Protocol | None], ...]
    node: str = ""
    zone: str = ""
    wishes: Wishes = NOTHING

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
    zone: str
    hints: tuple[str, ...]
    node: str = ""
    node_hints: tuple[str, ...] = ()


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
    external: str
    ports: tuple[RawPort, ...]
    affinity: bool
    same_zone: bool
    foreign: tuple[str, ...] = ()
    """Protocols that say nothing to us, each with its port."""
    same_node: bool = False
    local: bool = False
    """Clients reach what is on their own node, and nothing else."""

    def port(self, number: int) -> RawPort | None:
        """An ExternalName that lists no ports has every one that is no sidecar's."""
        if self.external and not self.ports and number not in _SIDECAR_PORTS:
            return RawPort("", number, None)
        return next((port for port in self.ports if port.number == number), None)

    def reached_at(self, numbers: Iterable[int]) -> "RawService":
        """An ExternalName with the ports that somebody wants of it."""
        if not self.external or self.ports:
            return self
        return replace(self, ports=tuple(RawPort("", n, None) for n in sorted(set(numbers))))

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
        _service_account(spec),
        tuple(sorted({a for a in addresses if a is not None}, key=address_key)),
        spec["hostNetwork"].boolean(False),
        tuple(sorted(ports.items())),
        spec["nodeName"].text(""),
        item.root["metadata"]["labels"][ZONE].text(""),
        read_pod_wishes(item),
    )


def _service_account(spec: Field) -> str:
    """As the API server fills it in; `serviceAccount` is its name of old."""
    return spec["serviceAccountName"].text("") or spec["serviceAccount"].text("") or "default"


def read_node(item: Item) -> str:
    """The zone that a node is in, or empty."""
    return item.root["metadata"]["labels"][ZONE].text("")


def read_service(item: Item) -> RawService:
    spec = item.spec
    given = spec["clusterIPs"].items() or [spec["clusterIP"]]
    addresses = [
        field.address() for field in given if field.present and field.value not in ("", "None")
    ]
    external = spec["type"].text("ClusterIP") == "ExternalName"
    ports: dict[int, RawPort] = {}
    names: set[str] = set()
    foreign: list[str] = []
    for field in spec["ports"].items():
        number, name = field["port"].port(), field["name"].text("")
        if isinstance(field["targetPort"].value, int):
            field["targetPort"].port()
        if not _is_tcp(field) or number != field["port"].value:
            continue
        if external and number in _SIDECAR_PORTS:
            field["port"].problem("is a sidecar's own, which a name must not lead to; remove it")
        if number in ports:
            field["port"].problem("is given twice; give each port of a service its own number")
            continue
        if name in names:
            field["name"].problem("must be there and differ between the ports of a service")
        said = field["appProtocol"].text("")
        if said and _plain(said) not in _PROTOCOLS:
            foreign.append(f"appProtocol {said} of port {number}")
        names.add(name)
        ports[number] = RawPort(name, number, protocol_of(said, name))
    # A headless service is reached without us, or by routes: kube-proxy has no part in it.
    inside = spec["internalTrafficPolicy"].choice(_Internal, _Internal.CLUSTER)
    distribution = _distribution(spec["trafficDistribution"])
    return RawService(
        item.name,
        item,
        tuple(sorted({a for a in addresses if a is not None}, key=address_key)),
        spec["selector"].labels(),
        _external_name(spec) if external else "",
        tuple(ports[number] for number in sorted(ports)),
        spec["sessionAffinity"].choice(_Affinity, _Affinity.NONE) is _Affinity.CLIENT,
        bool(distribution),
        tuple(foreign),
        distribution == _SAME_NODE,
        inside is _Internal.LOCAL and any(a is not None for a in addresses),
    )


def _external_name(spec: Field) -> str:
    """Where an ExternalName leads. Names of the client's own machine are refused: behind them is
    the sidecar's administration, which is not for those who write services."""
    field = spec["externalName"]
    name = field.matching(_EXTERNAL, "a host name such as db.example.com").rstrip(".")
    last = name.lower().rpartition(".")[2]
    if last == "localhost":
        field.problem("must not be the client itself; use a Service with a selector")
    elif last.isdecimal():
        field.problem("must not be an IP address; use a Service with an EndpointSlice")
    return name


def _distribution(field: Field) -> str:
    value = field.text("")
    if value and value not in _SAME_ZONE:
        field.misfit(f"is not known (known: {', '.join(_SAME_ZONE)}); all endpoints count alike")
        return ""
    return value


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
        addresses = [_elsewhere(field) for field in endpoint["addresses"].filled("name an address")]
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
                endpoint["zone"].text(""),
                tuple(zone["name"].text() for zone in endpoint["hints"]["forZones"].items()),
                endpoint["nodeName"].text(""),
                tuple(node["name"].text() for node in endpoint["hints"]["forNodes"].items()),
            )
        )
    if not service:
        return None
    return Slice(Name(item.name.namespace, service), tuple(ports), tuple(endpoints))


def _elsewhere(field: Field) -> IPAddress | None:
    """An endpoint's address. As an API server does (ValidateNonSpecialIP), none that means the
    client itself, or something else on each link."""
    address = field.address()
    if address is not None and (
        address.is_loopback or address.is_link_local or address.is_unspecified
    ):
        field.problem("must not be a loopback, link-local or unspecified address")
    return address


def protocol_of(app_protocol: str, port_name: str) -> Protocol | None:
    """What a port declares; appProtocol beats the name. An appProtocol we do not know is somebody's
    own protocol, so TCP to us."""
    if app_protocol:
        return _PROTOCOLS.get(_plain(app_protocol), Protocol.TCP)
    word = port_name.split("-")[0]
    return _PROTOCOLS.get(word, Protocol.HTTP if word.startswith("http") else None)


def _plain(app_protocol: str) -> str:
    return app_protocol.lower().removeprefix("kubernetes.io/")


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def pairs(service: RawService | None, piece: Slice) -> list[tuple[RawPort, int]]:
    """The service's ports, each with the port that it leads to according to the slice."""
    if service is None:
        return []
    by_name = {port.name: port for port in service.ports}
    return [(by_name[port.name], port.number) for port in piece.ports if port.name in by_name]


def _is_tcp(port: Field) -> bool:
    return port["protocol"].text("TCP") == "TCP"


def address_key(address: IPAddress) -> tuple[int, int]:
    """Sorts addresses of both families."""
    return address.version, int(address)
