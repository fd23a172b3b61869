"""The gRPC shell: listens, lets clients in, and runs a connection for each of them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DiscoveryRequest
from google.protobuf.message import DecodeError

from redirector.errors import InputError, RedirectorError
from xds_server.connection import Connection
from xds_server.delta import DeltaStream
from xds_server.generation import Generation
from xds_server.hub import REPORT_AFTER_S, Hub
from xds_server.ir import NodeId
from xds_server.push import Push, count
from xds_server.sotw import SotwStream

log = logging.getLogger(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
#: Envoy's first request carries a node of about 61 kB; names of 10,000 resources are below 1 MB.
MAX_REQUEST_BYTES = 4 << 20

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


class Server:
    """Serves one generation at a time to every sidecar that connects; see Hub for `report`."""

    def __init__(
        self,
        generation: Generation,
        *,
        report: Callable[[Push], None],
        report_after: float = REPORT_AFTER_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._hub = Hub(generation, report=report, report_after=report_after, clock=clock)
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
        self._hub.closing = True
        for connection in self._hub.connections:
            connection.wake.set()
        await self._grpc.stop(grace)
        self._hub.close()

    async def publish(self, generation: Generation, reason: str, changed_at: float) -> None:
        """Bring every client to this generation; an error is raised before any sees a change."""
        await self._hub.publish(generation, reason, changed_at)

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
        if first is None or self._hub.closing:
            return
        try:
            node = NodeId.parse(first.node.id)
        except InputError as error:
            log.warning("refused a client: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        connection = Connection(self._hub, node, stream)
        connections = self._hub.connections
        connections.add(connection)
        log.info("%s connected, %s", connection, count(len(connections), "sidecar"))
        connection.receive(first)
        reader = asyncio.create_task(connection.read(requests))
        try:
            await connection.write(context)
            if connection.closed:
                await reader
        except RedirectorError as error:
            log.error("%s", error)
            await context.abort(grpc.StatusCode.INTERNAL, str(error))
        finally:
            reader.cancel()
            connections.discard(connection)
            log.info("%s gone, %s left", connection, count(len(connections), "sidecar"))
            self._hub.settle(connection)
