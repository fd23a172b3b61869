"""The gRPC shell: listens, lets clients in, and runs a connection for each of them."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from redirector.errors import InputError, RedirectorError
from xds_server.admission import Admission, Limits, Reason, Refused
from xds_server.connection import END, Connection
from xds_server.delta import DeltaStream
from xds_server.generation import Generation
from xds_server.hub import REPORT_AFTER_S, Hub
from xds_server.identity import DEFAULT_TRUST_DOMAIN, NotPermitted, Peer, permit
from xds_server.ir import Client, Name, NodeId, Workload
from xds_server.methods import METHODS, Method
from xds_server.metrics import render
from xds_server.push import Push, count
from xds_server.quarantine import Quarantined
from xds_server.sotw import SotwStream
from xds_server.standing import Standing
from xds_server.tally import Tally
from xds_server.witnesses import Witness, credible, trust

log = logging.getLogger(__name__)

#: Envoy's first request carries a node of about 61 kB; names of 10,000 resources are below 1 MB.
MAX_REQUEST_BYTES = 4 << 20
#: Of one connection at a time; an Envoy has one. What comes beyond waits in the client.
MAX_STREAMS = 100

_STATUS = {
    Reason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NODE_ID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.IDENTITY: grpc.StatusCode.PERMISSION_DENIED,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
}
#: A stream ends at its age at the latest, up to this part of it earlier.
_AGE_JITTER = 0.2
#: Streams that end because the server does: so many a second, within so many seconds at most.
_DRAIN_RATE = 200.0
_DRAIN_S = 5.0
#: Far beyond what gRPC takes to notice that a client went.
_CANCEL_S = 60.0


def _options(limits: Limits) -> list[tuple[str, int]]:
    age_ms = int(limits.stream_age_s * 1000)
    return [
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", -1),
        # Two servers on one port would each serve some of the sidecars: the second must fail.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        # Connections that ask for nothing hold a file descriptor each.
        ("grpc.max_connection_idle_ms", 300_000),
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A stream that follows another on one connection proves nothing anew, so connections
        # have an age, too. The grace is for the last stream's own end; what is stuck is cut.
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", age_ms + int(limits.stuck_s * 1000)),
    ]


class Server:
    """Serves one generation at a time to every sidecar that connects; see Hub for `report`.

    Clients on encrypted connections are served as the pod that their certificate names, of those
    that the server was told of with `know`.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        report: Callable[[Push], None],
        report_after: float = REPORT_AFTER_S,
        clock: Callable[[], float] = time.time,
        limits: Limits | None = None,
        trust_domain: str = DEFAULT_TRUST_DOMAIN,
    ) -> None:
        self._limits = limits or Limits()
        self._admission = Admission(self._limits)
        self._trust_domain = trust_domain
        self._retired = False
        self._workloads: Mapping[Name, Workload] = {}
        self._hub = Hub(generation, report=report, report_after=report_after, clock=clock)
        self._grpc = grpc.aio.server(options=_options(self._limits))
        self._grpc.add_generic_rpc_handlers(tuple(self._handlers()))

    def listen(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Bind a gRPC address (`host:port` or `unix:/path`); returns the port, 1 for a socket.

        RuntimeError when it cannot be bound.
        """
        port: int
        if credentials is None:
            port = self._grpc.add_insecure_port(address)
        else:
            port = self._grpc.add_secure_port(address, credentials)
        return port

    async def start(self) -> None:
        """Start to serve."""
        await self._grpc.start()

    def retire(self) -> None:
        """Say that it is about to stop, and serve as ever until it does."""
        self._retired = True

    async def stop(self, grace: float = 2.0) -> None:
        """Let no new client in and end the streams one after the other, in good order.

        Clients come back to whoever serves then: spread out, lest they come all at once. A client
        that does not let go in `grace` s is cut.
        """
        self._admission.draining = True
        connections = self._connections()
        window = min(_DRAIN_S, len(connections) / _DRAIN_RATE) if grace else 0.0
        ended = asyncio.ensure_future(self._grpc.stop(window + grace))
        await asyncio.sleep(0)
        for position, connection in enumerate(connections):
            delay = window * position / len(connections)
            asyncio.get_running_loop().call_later(delay, connection.leave)
        await ended
        self._hub.close()

    async def publish(
        self, generation: Generation, reason: str, changed_at: float, *, wait: float = 0.0
    ) -> None:
        """Bring every client to this generation; an error is raised before any sees a change.

        `wait` s at most until those that it concerns have answered.
        """
        push = await self._hub.publish(generation, reason, changed_at)
        if wait:
            await self._hub.ended(push, wait)

    @property
    def tally(self) -> Tally:
        """What happened so far."""
        return self._hub.tally

    @property
    def retired(self) -> bool:
        """Whether new clients had better go elsewhere."""
        return self._retired or self._admission.draining

    def standings(self) -> list[Standing]:
        """Where every sidecar stands now."""
        return [connection.standing() for connection in self._connections()]

    def metrics(self) -> bytes:
        """In Prometheus' text format."""
        return render(self._hub, self._admission)

    def know(self, workloads: Mapping[Name, Workload]) -> None:
        """Judge clients by these pods from now on, those that are connected included."""
        self._workloads = workloads
        for connection in self._connections():
            try:
                self._judge(connection.node, connection.peer)
            except Refused as refused:
                self._admission.note(refused)
                connection.leave()

    def refused(self) -> Iterator[tuple[NodeId, Quarantined]]:
        """What clients have refused, and keep in an earlier version or not at all, as far as it
        may be believed."""

        def witness(client: Connection) -> Witness:
            known = trust(self._workloads, client.node, client.peer, client.address)
            return Witness(client.node, known, client.stream)

        return credible(map(witness, self._connections()))

    def _connections(self) -> list[Connection]:
        return [client for client in self._hub.connections if isinstance(client, Connection)]

    def _judge(self, node: NodeId, peer: Peer | None) -> None:
        if peer is None:
            return
        try:
            permit(self._workloads, self._trust_domain, node, peer)
        except NotPermitted as error:
            raise Refused(Reason.IDENTITY, str(error)) from None

    def _handlers(self) -> "Iterator[grpc.GenericRpcHandler[Any, Any]]":
        def handler(method: Method) -> "grpc.RpcMethodHandler[Any, Any]":
            async def serve(_: AsyncIterator[Any], context: Any) -> None:
                await self._serve(method.stream(), context)

            # Messages are bytes: resources are encoded once for all clients, and most of what they
            # answer is told without reading it.
            return grpc.stream_stream_rpc_method_handler(serve)

        for service, methods in groupby(METHODS, lambda method: method.service):
            handlers = {method.name: handler(method) for method in methods}
            yield grpc.method_handlers_generic_handler(service, handlers)

    async def _serve(self, stream: DeltaStream | SotwStream, context: Any) -> None:
        try:
            with self._admission.place():
                connection = await self._admitted(stream, context)
                if connection is not None:
                    await self._run(connection, context)
            return
        except DecodeError as error:
            refused = Refused(Reason.MALFORMED, str(error))
        except Refused as error:
            refused = error
        except RedirectorError as error:
            log.error("%s", error)
            await context.abort(grpc.StatusCode.INTERNAL, str(error))
            return
        self._admission.note(refused)
        code = _STATUS.get(refused.reason, grpc.StatusCode.RESOURCE_EXHAUSTED)
        await context.abort(code, str(refused))

    async def _admitted(self, stream: DeltaStream | SotwStream, context: Any) -> Connection | None:
        """The client once it has said who it is; None when it went without a word."""
        try:
            async with asyncio.timeout(self._limits.first_request_s):
                first = await context.read()
        except TimeoutError:
            raise Refused(
                Reason.NO_REQUEST, f"no request within {self._limits.first_request_s:g} s"
            ) from None
        if first is END or self._admission.draining:
            return None
        request = stream.parse(first)
        try:
            node = NodeId.parse(request.node.id, request.node.user_agent_name)
        except InputError as error:
            raise Refused(Reason.NODE_ID, str(error)) from None
        peer = Peer.of(context.auth_context())
        self._judge(node, peer)
        connection = Connection(self._hub, node, stream, peer, self._limits, context.peer())
        if isinstance(stream, SotwStream):
            # Envoy names what its clusters and listeners use, and those are sent by us, too.
            stream.forgetful = node.client is not Client.ENVOY
        # How much it may ask for is told by what there is for it.
        await connection.refresh()
        connection.receive(request)
        return connection

    async def _run(self, connection: Connection, context: Any) -> None:
        connections = self._hub.connections
        connections.add(connection)
        log.info("%s connected, %s", connection, count(len(connections), "sidecar"))
        reader = asyncio.create_task(connection.read(context))
        age = self._limits.stream_age_s * random.uniform(1 - _AGE_JITTER, 1)
        aged = asyncio.get_running_loop().call_later(age, connection.leave)
        try:
            await connection.write(context)
            if connection.closed:
                await reader
        except grpc.aio.InternalError:
            # A write fails like this when the client goes meanwhile: gRPC is about to cancel us.
            # To return before that would make it answer a call that is no more, with a traceback.
            await asyncio.sleep(_CANCEL_S)
        finally:
            aged.cancel()
            reader.cancel()
            connections.discard(connection)
            log.info("%s gone, %s left", connection, count(len(connections), "sidecar"))
            self._hub.settle(connection)
