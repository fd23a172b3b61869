"""A server on a free loopback port, and clients of it that speak the protocol by hand."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from waiting import PATIENCE_S
from worlds import Resources, world
from xds_server.admission import Limits
from xds_server.generation import Generation
from xds_server.push import Push
from xds_server.references import CLUSTER
from xds_server.server import Server

__all__ = ["EOF", "NODE", "PATIENCE_S", "ack", "answer", "connected", "first", "running"]

EOF = grpc.aio.EOF  # type: ignore[attr-defined]
NODE = "sidecar~10.0.0.1~web.demo~demo.svc.cluster.local"


class Running:
    """A server on a free loopback port, and what it reported."""

    def __init__(self, resources: Resources, report_after: float, limits: Limits | None) -> None:
        self._reports: asyncio.Queue[Push] = asyncio.Queue()
        self.server = Server(
            Generation(lambda _: resources),
            report=self._reports.put_nowait,
            report_after=report_after,
            limits=limits,
        )
        self.port = self.server.listen("127.0.0.1:0")

    async def publish(self, resources: Resources, reason: str = "changed a.yaml") -> None:
        await self.server.publish(Generation(lambda _: resources), reason, time.time())

    async def report(self) -> Push:
        return await asyncio.wait_for(self._reports.get(), PATIENCE_S)


@asynccontextmanager
async def running(
    resources: Resources | None = None,
    report_after: float = PATIENCE_S,
    options: Sequence[tuple[str, int]] = (),
    limits: Limits | None = None,
) -> AsyncIterator[tuple[Running, AggregatedDiscoveryServiceStub]]:
    started = Running(world() if resources is None else resources, report_after, limits)
    await started.server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{started.port}", options) as channel:
            yield started, AggregatedDiscoveryServiceStub(channel)
    finally:
        await started.server.stop(grace=0)


async def answer(call: Any) -> Any:
    found = await asyncio.wait_for(call.read(), PATIENCE_S)
    assert found is not EOF, (await call.code(), await call.details())
    return found


def first(type_url: str, node: str = NODE, **fields: Any) -> DeltaDiscoveryRequest:
    request = DeltaDiscoveryRequest(type_url=type_url, **fields)
    request.node.id = node
    return request


def ack(response: DeltaDiscoveryResponse, error: str | None = None) -> DeltaDiscoveryRequest:
    request = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
    if error is not None:
        request.error_detail.message = error
    return request


async def connected(stub: AggregatedDiscoveryServiceStub, node: str = NODE) -> Any:
    """A client that has the clusters and no interest in anything else."""
    call = stub.DeltaAggregatedResources()
    await call.write(first(CLUSTER, node))
    await call.write(ack(await answer(call)))
    return call
