"""The gRPC shell around the ADS state machines: streams in, snapshots out, answers booked."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DiscoveryRequest
from google.protobuf.message import DecodeError

from redirector.errors import InputError, RedirectorError
from xds_server.delta import DeltaStream
from xds_server.generation import Generation
from xds_server.ir import NodeId
from xds_server.push import Push, count, listed
from xds_server.references import kind
from xds_server.snapshot import Snapshot
from xds_server.sotw import SotwStream
from xds_server.stream import Nack, Response

log = logging.getLogger(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
#: Envoy's first request carries a node of about 61 kB; names of 10,000 resources are below 1 MB.
MAX_REQUEST_BYTES = 4 << 20
#: How long a change waits for answers before it is reported without them.
REPORT_AFTER_S = 5.0

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    # Two servers on one port would each serve some of the sidecars: the second must fail.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class Connection:
    """One client's stream and where it stands."""

    def __init__(self, node: NodeId, stream: DeltaStream | SotwStream) -> None:
        self.node = node
        self.stream = stream
        self.generation: Generation | None = None
        self.wake = asyncio.Event()
        self.closed = False
        self.sent_at: dict[str, float] = {}

    def __str__(self) -> str:
        return f"{self.node.pod}.{self.node.namespace}"


class Server:
    """Serves one generation at a time to every sidecar that connects.

    `report` is given each push when all clients have answered, or after `report_after` seconds.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        report: Callable[[Push], None],
        report_after: float = REPORT_AFTER_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._generation = generation
        self._report = report
        self._report_after = report_after
        self._clock = clock
        self._connections: set[Connection] = set()
        self._pushes: dict[Push, asyncio.TimerHandle] = {}
        self._closing = False
        # One thread: snapshots share an encoder, and the event loop stays free meanwhile.
        self._translator = ThreadPoolExecutor(1, "translate")
        self._grpc = grpc.aio.server(options=_OPTIONS)
        self._grpc.add_generic_rpc_handlers((self._handlers(),))

    def listen(self, address: str) -> int:
        """Bind a gRPC address (`host:port` or `unix:/path`); returns the port, 1 for a socket.

        RuntimeError when it cannot be bound.
        """
        port: int = self._grpc.add_insecure_port(address)
        return port

    async def start(self) -> None:
        """Start to serve."""
        await self._grpc.start()

    async def stop(self, grace: float = 2.0) -> None:
        """End every stream in good order; a client that does not let go in `grace` s is cut."""
        self._closing = True
        for connection in self._connections:
            connection.wake.set()
        await self._grpc.stop(grace)
        for push in list(self._pushes):
            self._finish(push)
        self._translator.shutdown()

    async def publish(self, generation: Generation, reason: str, changed_at: float) -> None:
        """Bring every client to this generation.

        All their snapshots are made first: an error is raised before any client sees a change.
        """
        nodes = {connection.node for connection in self._connections}
        await self._in_translator(generation.prepare, nodes)
        old, self._generation = self._generation, generation
        connections = set(self._connections)
        changed = set()
        for node in nodes:
            changed |= _changed(old.ready(node), generation.ready(node))
        push = Push(reason, changed_at, tuple(sorted(changed)), set(connections))
        self._pushes[push] = asyncio.get_running_loop().call_later(
            self._report_after, self._finish, push
        )
        for connection in connections:
            connection.wake.set()
        self._settle(None)

    def _finish(self, push: Push) -> None:
        self._pushes.pop(push).cancel()
        log.info("%s", push.summary())
        self._report(push)

    def _settle(self, connection: Connection | None) -> None:
        """Close the books on pushes that this client, now up to date, was the last to answer."""
        for push in list(self._pushes):
            push.waiting.discard(connection)
            if not push.waiting:
                self._finish(push)

    async def _in_translator(self, function: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._translator, function, *args)

    def _handlers(self) -> "grpc.GenericRpcHandler[Any, Any]":
        def handler(
            variant: type[DeltaStream | SotwStream], request: type[Any]
        ) -> "grpc.RpcMethodHandler[Any, Any]":
            async def serve(requests: AsyncIterator[Any], context: Any) -> None:
                await self._serve(variant(), requests, context)

            # Responses are bytes already: resources are encoded once for all clients.
            return grpc.stream_stream_rpc_method_handler(
                serve, request_deserializer=request.FromString, response_serializer=bytes
            )

        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "DeltaAggregatedResources": handler(DeltaStream, DeltaDiscoveryRequest),
                "StreamAggregatedResources": handler(SotwStream, DiscoveryRequest),
            },
        )

    async def _serve(
        self, stream: DeltaStream | SotwStream, requests: AsyncIterator[Any], context: Any
    ) -> None:
        try:
            await self._serve_decoded(stream, requests, context)
        except DecodeError as error:
            log.warning("refused a client: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _serve_decoded(
        self, stream: DeltaStream | SotwStream, requests: AsyncIterator[Any], context: Any
    ) -> None:
        first = await anext(requests, None)
        if first is None or self._closing:
            return
        try:
            node = NodeId.parse(first.node.id)
        except InputError as error:
            log.warning("refused a client: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        connection = Connection(node, stream)
        self._connections.add(connection)
        log.info("%s connected, %s", connection, count(len(self._connections), "sidecar"))
        self._receive(connection, first)
        reader = asyncio.create_task(self._read(connection, requests))
        try:
            await self._write(connection, context)
            if connection.closed:
                await reader
        except RedirectorError as error:
            log.error("%s", error)
            await context.abort(grpc.StatusCode.INTERNAL, str(error))
        finally:
            reader.cancel()
            self._connections.discard(connection)
            log.info("%s gone, %s left", connection, count(len(self._connections), "sidecar"))
            self._settle(connection)

    async def _read(self, connection: Connection, requests: AsyncIterator[Any]) -> None:
        try:
            async for request in requests:
                self._receive(connection, request)
        finally:
            connection.closed = True
            connection.wake.set()

    def _receive(self, connection: Connection, request: Any) -> None:
        now = self._clock()
        answer = connection.stream.receive(request)
        log.debug("%s asks %s", connection, _question(request))
        connection.wake.set()
        if answer is None:
            return
        took = (now - connection.sent_at.pop(answer.nonce)) * 1000
        what = f"{answer.nonce} ({kind(answer.type_url)}) after {took:.1f} ms"
        nack = None
        if isinstance(answer, Nack):
            nack = f"{connection}: {kind(answer.type_url)} {answer.version}: {answer.error}"
            log.warning("%s NACK %s: %s", connection, what, answer.error)
        else:
            log.info("%s ACK %s", connection, what)
        for push in self._pushes:
            push.answered(connection, answer.nonce, now, nack)

    async def _write(self, connection: Connection, context: Any) -> None:
        """Send what the client lacks, whenever anything changed.

        Each message is worked out only when the one before it was taken: a slow client is never
        sent a state that was overtaken meanwhile.
        """
        stream = connection.stream
        while not (connection.closed or self._closing):
            await connection.wake.wait()
            connection.wake.clear()
            while not self._closing:
                await self._refresh(connection)
                response = stream.next_response()
                if response is None:
                    break
                self._note_sent(connection, response)
                await context.write(response.body)
            if stream.settled and connection.generation is self._generation:
                self._settle(connection)

    async def _refresh(self, connection: Connection) -> None:
        """Offer the stream the current generation, if it has not been yet."""
        while connection.generation is not self._generation:
            generation = self._generation
            snapshot: Snapshot | None = generation.ready(connection.node)
            if snapshot is None:
                snapshot = await self._in_translator(generation.snapshot, connection.node)
            assert snapshot is not None
            connection.generation = generation
            connection.stream.offer(snapshot)

    def _note_sent(self, connection: Connection, response: Response) -> None:
        connection.sent_at[response.nonce] = self._clock()
        for push in self._pushes:
            push.sent(connection, response.nonce)
        log.info(
            "%s sent %s (%s): %s, %d bytes",
            connection,
            response.nonce,
            kind(response.type_url),
            _contents(response),
            len(response.body),
        )


def _question(request: DeltaDiscoveryRequest | DiscoveryRequest) -> str:
    if isinstance(request, DiscoveryRequest):
        words = [("names", request.resource_names)]
    else:
        words = [
            ("subscribes", request.resource_names_subscribe),
            ("unsubscribes", request.resource_names_unsubscribe),
            ("has", request.initial_resource_versions),
        ]
    parts = [f"{word} {len(names)} ({listed(names)})" for word, names in words if names]
    return f"{kind(request.type_url)}: {', '.join(parts) or 'nothing by name'}"


def _contents(response: Response) -> str:
    parts = []
    if response.resources:
        names = listed(entry.name for entry in response.resources)
        parts.append(f"{len(response.resources)} ({names})")
    if response.removed:
        parts.append(f"{len(response.removed)} removed ({listed(response.removed)})")
    return ", ".join(parts) or "nothing"


def _changed(old: Snapshot | None, new: Snapshot | None) -> set[str]:
    """Names of the resources that differ, with their kinds."""
    if old is None or new is None:
        return set()
    return {
        f"{kind(type_url)} {name}"
        for type_url in {*old.types, *new.types}
        for name in new.of(type_url).changed_since(old.of(type_url))
    }
