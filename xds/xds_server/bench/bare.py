"""The yardstick: grpc.aio sends the same bytes to as many clients and hears their answers, and
knows nothing of xDS. What a server costs beyond that is its own."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import grpc
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryResponse, DiscoveryResponse
from google.protobuf.any_pb2 import Any as Wrapped

from xds_server.bench.clients import CLIENTS, SERVICE, Variant
from xds_server.bench.served import Change, commands
from xds_server.garbage import settle
from xds_server.references import CLUSTER, ENDPOINT, LISTENER

#: What a client asks for, and answers, until it has all: nothing of two types.
_GREETINGS = 4


def run(control: Connection, address: str, variant: Variant, cpu: int) -> None:
    """The process: is told how many bytes a message is to have, sends it to all, and answers when
    all have."""
    os.sched_setaffinity(0, {cpu})
    asyncio.run(_Bare(variant).serve(control, address))


class _Bare:
    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._streams: list[asyncio.Queue[bytes]] = []
        self._left = 0
        self._answered = asyncio.Event()

    async def serve(self, control: Connection, address: str) -> None:
        server = grpc.aio.server()
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(
            self._stream
        )
        method = CLIENTS[self._variant].method
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {method: handler}),)
        )
        server.add_insecure_port(address)
        await server.start()
        settle()
        control.send(None)
        async for size in commands(control):
            control.send(await self._fan_out(size))
        await server.stop(0)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        for type_url in (CLUSTER, LISTENER):
            outgoing.put_nowait(self._message(type_url, 0))
        self._streams.append(outgoing)
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                await context.write(await outgoing.get())
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        heard = 0
        async for _ in requests:
            heard += 1
            if heard > _GREETINGS:
                self._left -= 1
                if not self._left:
                    self._answered.set()

    async def _fan_out(self, size: int) -> Change:
        message = self._message(ENDPOINT, size)
        at, spent = time.monotonic(), time.process_time()
        self._left = len(self._streams)
        self._answered.clear()
        for outgoing in self._streams:
            outgoing.put_nowait(message)
        await self._answered.wait()
        seconds, cpu = time.monotonic() - at, time.process_time() - spent
        return Change(at, seconds, cpu, 1, 0, 1, len(self._streams), 0)

    def _message(self, type_url: str, size: int) -> bytes:
        """A response with one resource of that many bytes, or none."""
        body = ClusterLoadAssignment(cluster_name="bare").SerializeToString() + bytes(size)
        wrapped = [Wrapped(type_url=type_url, value=body)] if size else []
        message: bytes
        if self._variant is Variant.SOTW:
            sotw = DiscoveryResponse(type_url=type_url, nonce="1", resources=wrapped)
            message = sotw.SerializeToString()
            return message
        delta = DeltaDiscoveryResponse(type_url=type_url, nonce="1")
        for each in wrapped:
            delta.resources.add(name="bare", version="1", resource=each)
        message = delta.SerializeToString()
        return message
