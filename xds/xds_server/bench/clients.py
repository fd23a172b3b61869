"""Many lean xDS clients in one process: each a connection of its own that subscribes as a sidecar
does, acknowledges what it is sent, and notes when that was."""

import selectors
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.service.discovery.v3.discovery_pb2 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
    DiscoveryResponse,
)
from google.protobuf.any_pb2 import Any

from xds_server.bench.objects import node_id
from xds_server.bench.wire import ClientStream
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE, references

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
_READ_BYTES = 1 << 18


class Variant(StrEnum):
    """Of the protocol: resources that changed, or the state of the world."""

    DELTA = "delta"
    SOTW = "sotw"


@dataclass(frozen=True)
class Arrivals:
    """What came since it was last asked: for each client that got anything, when the last of it was
    acknowledged (seconds, CLOCK_MONOTONIC), and the bytes that all got, gRPC's five a message
    included."""

    acknowledged: tuple[float, ...]
    received: int


class _Names:
    """Which resources a resource leads to, worked out once for all clients of the process."""

    def __init__(self) -> None:
        self._known: dict[bytes, frozenset[str]] = {}

    def of(self, resource: Any) -> frozenset[str]:
        found = self._known.get(resource.value)
        if found is None:
            message = (Cluster if resource.type_url == CLUSTER else Listener)()
            message.ParseFromString(resource.value)
            wanted = ENDPOINT if resource.type_url == CLUSTER else ROUTE
            found = frozenset(r.name for r in references(message) if r.type_url == wanted)
            self._known[resource.value] = found
        return found


class Client(ABC):
    """What both variants share; `complete` says that nothing that was asked for is missing."""

    method: str

    def __init__(self, number: int, names: _Names) -> None:
        self.stream = ClientStream(f"/{SERVICE}/{self.method}")
        self._names = names
        self._asked: dict[str, set[str]] = {ENDPOINT: set(), ROUTE: set()}
        self._missing: dict[str, set[str]] = {ENDPOINT: set(), ROUTE: set()}
        self._first = {CLUSTER, LISTENER}
        self.acknowledged = 0.0
        self.received = 0
        self._open(node_id(number))

    @property
    def complete(self) -> bool:
        return not (self._first or any(self._missing.values()))

    def take(self, message: bytes) -> None:
        """A response: book it, acknowledge it, ask for what it leads to."""
        type_url, names, targets = self._answer(message)
        self._first.discard(type_url)
        if type_url in self._missing:
            self._missing[type_url].difference_update(names)
        follow = {CLUSTER: ENDPOINT, LISTENER: ROUTE}.get(type_url)
        if follow is not None:
            more = targets - self._asked[follow]
            if more:
                self._asked[follow] |= more
                self._missing[follow] |= more
                self._ask(follow, more)
        self.acknowledged = time.monotonic()

    def _targets(self, resources: Iterable[Any]) -> set[str]:
        return set().union(*(self._names.of(resource) for resource in resources))

    @abstractmethod
    def _open(self, node: str) -> None:
        """Ask for all clusters and listeners."""

    @abstractmethod
    def _answer(self, message: bytes) -> tuple[str, Iterable[str], set[str]]:
        """Acknowledge; the type, the names that came, and what clusters or listeners lead to."""

    @abstractmethod
    def _ask(self, type_url: str, names: set[str]) -> None:
        """Subscribe to these, too."""


class DeltaClient(Client):
    method = "DeltaAggregatedResources"

    def _open(self, node: str) -> None:
        for type_url in (CLUSTER, LISTENER):
            request = DeltaDiscoveryRequest(type_url=type_url)
            request.node.id = node
            self.stream.send(request.SerializeToString())

    def _answer(self, message: bytes) -> tuple[str, Iterable[str], set[str]]:
        response = DeltaDiscoveryResponse.FromString(message)
        ack = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        self.stream.send(ack.SerializeToString())
        targets: set[str] = set()
        if response.type_url in (CLUSTER, LISTENER):
            targets = self._targets(entry.resource for entry in response.resources)
        return response.type_url, [entry.name for entry in response.resources], targets

    def _ask(self, type_url: str, names: set[str]) -> None:
        request = DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=sorted(names))
        self.stream.send(request.SerializeToString())


class SotwClient(Client):
    method = "StreamAggregatedResources"

    def __init__(self, number: int, names: _Names) -> None:
        self._last: dict[str, DiscoveryRequest] = {}
        super().__init__(number, names)

    def _open(self, node: str) -> None:
        for type_url in (CLUSTER, LISTENER):
            request = self._last[type_url] = DiscoveryRequest(type_url=type_url)
            request.node.id = node
            self.stream.send(request.SerializeToString())
            request.ClearField("node")

    def _answer(self, message: bytes) -> tuple[str, Iterable[str], set[str]]:
        response = DiscoveryResponse.FromString(message)
        ack = self._last.setdefault(response.type_url, DiscoveryRequest(type_url=response.type_url))
        ack.version_info, ack.response_nonce = response.version_info, response.nonce
        self.stream.send(ack.SerializeToString())
        if response.type_url in (CLUSTER, LISTENER):
            return response.type_url, (), self._targets(response.resources)
        return response.type_url, [_name(entry) for entry in response.resources], set()

    def _ask(self, type_url: str, names: set[str]) -> None:
        request = self._last.setdefault(type_url, DiscoveryRequest(type_url=type_url))
        request.resource_names.extend(sorted(names))
        self.stream.send(request.SerializeToString())


def _name(resource: Any) -> str:
    """The name of endpoints or of a route configuration: field 1 of both."""
    value: bytes = resource.value
    if value[:1] != b"\x0a" or value[1] >= 0x80:
        raise ValueError("a name of more than 127 bytes")
    return value[2 : 2 + value[1]].decode()


CLIENTS: dict[Variant, type[Client]] = {Variant.DELTA: DeltaClient, Variant.SOTW: SotwClient}


class Crowd:
    """All clients of this process, on one selector."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._names = _Names()
        self._selector = selectors.DefaultSelector()
        self._clients: list[Client] = []

    def join(self, variant: Variant, numbers: Iterable[int]) -> None:
        """Connect one client after the other, reading meanwhile."""
        for number in numbers:
            client = CLIENTS[variant](number, self._names)
            link = socket.socket(socket.AF_UNIX)
            link.connect(self._address)
            link.sendall(client.stream.take_output())
            self._selector.register(link, selectors.EVENT_READ, client)
            self._clients.append(client)
            self.turn(0)

    @property
    def complete(self) -> int:
        """How many have all they asked for."""
        return sum(client.complete for client in self._clients)

    def turn(self, timeout: float | None) -> None:
        """Read from whoever has something, once."""
        for key, _ in self._selector.select(timeout):
            link, client = key.fileobj, key.data
            if not isinstance(client, Client):
                continue
            assert isinstance(link, socket.socket)
            data = link.recv(_READ_BYTES)
            if not data:
                raise ConnectionError("the server hung up")
            for message in client.stream.receive(data):
                client.take(message)
            if output := client.stream.take_output():
                link.sendall(output)

    def listen_to(self, control: Connection) -> None:
        """Wake up for commands, too."""
        self._selector.register(control, selectors.EVENT_READ)

    def arrivals(self) -> Arrivals:
        """And begin anew."""
        moments, received = [], 0
        for client in self._clients:
            received += client.stream.received - client.received
            client.received = client.stream.received
            if client.acknowledged:
                moments.append(client.acknowledged)
                client.acknowledged = 0.0
        return Arrivals(tuple(moments), received)


def run(control: Connection, address: str, variant: Variant, numbers: range) -> None:
    """The process: connects, then answers `complete` and `arrivals` until the pipe closes."""
    crowd = Crowd(address)
    crowd.join(variant, numbers)
    crowd.listen_to(control)
    try:
        while True:
            crowd.turn(None)
            while control.poll():
                command = control.recv()
                control.send(crowd.complete if command == "complete" else crowd.arrivals())
    except (EOFError, ConnectionError):
        return
