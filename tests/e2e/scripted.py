"""The xDS server on resources of a test's making, in a process of its own: gRPC and fork do not
mix, and what the real server's translation would never emit must be served, too."""

import asyncio
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from google.protobuf.message import Message
from waiting import PATIENCE_S
from xds_server.connection import Connection
from xds_server.generation import Generation
from xds_server.push import Push
from xds_server.quarantine import Quarantined
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE
from xds_server.server import Server

Resources = Mapping[str, Mapping[str, Message]]
_Wire = dict[str, dict[str, bytes]]
_TYPES: dict[str, type[Message]] = {
    CLUSTER: Cluster,
    ENDPOINT: ClusterLoadAssignment,
    LISTENER: Listener,
    ROUTE: RouteConfiguration,
}


@dataclass(frozen=True)
class Outcome:
    """What became of a push: refusals, who did not answer, what is quarantined for whom it may, and
    how many clients there are."""

    nacks: tuple[str, ...]
    waiting: int
    quarantined: tuple[Quarantined, ...]
    clients: int


class Scripted:
    """A running server, reached by a Unix socket that any user may open."""

    def __init__(self, socket: Path, resources: Resources) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, str(socket), _wire(resources)))
        self._process.start()
        self._receive()

    def _receive(self) -> Outcome:
        assert self._pipe.poll(PATIENCE_S), "the server does not answer"
        found: Outcome = self._pipe.recv()
        return found

    def publish(self, resources: Resources) -> Outcome:
        """Returns once all was answered, or after the time that a push is waited for."""
        self._pipe.send(_wire(resources))
        return self._receive()

    def stop(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join()


def _wire(resources: Resources) -> _Wire:
    return {
        url: {name: message.SerializeToString() for name, message in named.items()}
        for url, named in resources.items()
    }


def _main(pipe: Pipe, socket: str, first: _Wire) -> None:
    asyncio.run(_serve(pipe, socket, first))


async def _serve(pipe: Pipe, socket: str, first: _Wire) -> None:
    reports: asyncio.Queue[Push] = asyncio.Queue()
    server = Server(_generation(first), report=reports.put_nowait)
    server.listen(f"unix:{socket}")
    await server.start()
    Path(socket).chmod(0o666)
    pipe.send(Outcome((), 0, (), 0))
    while wire := await asyncio.to_thread(pipe.recv):
        await server.publish(_generation(wire), "changed by the test", time.time())
        push = await reports.get()
        streams = [c.stream for c in server._hub.connections if isinstance(c, Connection)]
        quarantined = tuple(found for stream in streams for found in stream.quarantined)
        pipe.send(Outcome(tuple(push.nacks), len(push.waiting), quarantined, len(streams)))
    await server.stop(grace=0)


def _generation(wire: _Wire) -> Generation:
    resources: Resources = {
        url: {name: _TYPES[url].FromString(body) for name, body in named.items()}
        for url, named in wire.items()
    }
    return Generation(lambda _: resources)
