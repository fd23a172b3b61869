"""The mesh that is measured, as Kubernetes objects: services with endpoints, and the clients' pods.

Objects that a change leaves alone stay the same Python objects, as a watching source has it.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address

from xds_server.groups import POLICY_VERSION
from xds_server.ingest.core import SERVICE_NAME
from xds_server.sources.objects import KubeObject

NAMESPACE = "bench"
#: As the controller of Kubernetes fills them.
ENDPOINTS_PER_SLICE = 100
#: Clients, services, endpoints, and where a changed endpoint goes; endpoints are no pods of the
#: mesh, so that the sizes are those of what is asked for.
_CLIENTS = IPv4Address("10.0.0.0")
_SERVICES = IPv4Address("10.64.0.0")
_ENDPOINTS = IPv4Address("10.128.0.0")
_MOVED = IPv4Address("11.0.0.0")


@dataclass(frozen=True)
class Size:
    """How large a mesh is; `endpoints` are those of each service."""

    clients: int
    services: int
    endpoints: int


class World:
    """All objects, and the changes that are measured."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self._pods = [_pod(number) for number in range(size.clients)]
        self._services = [_service(number) for number in range(size.services)]
        self._slices = [
            _slice(service, first, range(first, min(first + ENDPOINTS_PER_SLICE, size.endpoints)))
            for service in range(size.services)
            for first in range(0, size.endpoints, ENDPOINTS_PER_SLICE)
        ]
        self._policies = [_policy(0)]
        self._moves = 0

    def objects(self) -> list[KubeObject]:
        """Everything there is now."""
        return [*self._pods, *self._services, *self._slices, *self._policies]

    def move_endpoint(self) -> None:
        """One endpoint of one service gets an address that none had before."""
        self._moves += 1
        place = self._moves % len(self._slices)
        old = self._slices[place].data
        endpoints = old["endpoints"]
        assert isinstance(endpoints, list)
        fresh = [_endpoint(_MOVED + self._moves), *endpoints[1:]]
        self._slices[place] = KubeObject("", old | {"endpoints": fresh})

    def edit_policy(self) -> None:
        """The policy of one pod allows another range."""
        self._moves += 1
        self._policies[0] = _policy(self._moves)


def node_id(client: int) -> str:
    """What the client of this number calls itself."""
    return f"sidecar~{_CLIENTS + client}~client-{client}.{NAMESPACE}~{NAMESPACE}.svc.cluster.local"


def _object(version: str, kind: str, name: str, **rest: object) -> KubeObject:
    labels = rest.pop("labels", {})
    metadata = {"name": name, "namespace": NAMESPACE, "labels": labels}
    return KubeObject("", {"apiVersion": version, "kind": kind, "metadata": metadata} | rest)


def _pod(number: int) -> KubeObject:
    ports = [{"containerPort": 8080, "name": "http"}]
    address = str(_CLIENTS + number)
    return _object(
        "v1",
        "Pod",
        f"client-{number}",
        labels={"app": "client"},
        spec={"containers": [{"name": "app", "ports": ports}]},
        status={"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    )


def _service(number: int) -> KubeObject:
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    spec = {"clusterIP": str(_SERVICES + number), "ports": ports}
    return _object("v1", "Service", f"service-{number}", spec=spec)


def _slice(service: int, first: int, numbers: range) -> KubeObject:
    base = _ENDPOINTS + service * 1024
    return _object(
        "discovery.k8s.io/v1",
        "EndpointSlice",
        f"service-{service}-{first}",
        labels={SERVICE_NAME: f"service-{service}"},
        addressType="IPv4",
        ports=[{"name": "http", "port": 8080}],
        endpoints=[_endpoint(base + number) for number in numbers],
    )


def _endpoint(address: IPv4Address) -> dict[str, object]:
    return {"addresses": [str(address)], "conditions": {"ready": True}}


def _policy(edit: int) -> KubeObject:
    source = {"cidrs": [f"{_MOVED + edit}/32"]}
    spec = {
        "action": "DENY",
        "targetRefs": [{"kind": "Pod", "name": "client-0"}],
        "rules": [{"from": [source]}],
    }
    return _object(POLICY_VERSION, "AuthorizationPolicy", "edited", spec=spec)
