"""How streams end: at their age, when the server stops, when a client does not let go."""

import asyncio

import grpc
import pytest
from clients import EOF, PATIENCE_S, ack, answer, connected, first, running
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from worlds import world
from xds_server.admission import Limits
from xds_server.references import CLUSTER, ROUTE


async def test_stream_ends_at_its_age_and_what_it_brought_is_not_sent_again() -> None:
    async with running(limits=Limits(stream_age_s=0.5)) as (_, stub):
        call = stub.DeltaAggregatedResources()
        await call.write(first(CLUSTER))
        had = await answer(call)
        await call.write(ack(had))
        assert await asyncio.wait_for(call.read(), PATIENCE_S) is EOF
        assert await call.code() is grpc.StatusCode.OK
        known = {resource.name: resource.version for resource in had.resources}
        # A stream may end before its answer comes, when this machine is busy.
        got = EOF
        while got is EOF:
            call = stub.DeltaAggregatedResources()
            try:
                await call.write(first(CLUSTER, initial_resource_versions=known))
                got = await asyncio.wait_for(call.read(), PATIENCE_S)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                continue
        assert (got.type_url, got.nonce, list(got.resources)) == (CLUSTER, "1", [])


async def test_stopping_lets_every_client_go_in_good_order_and_no_new_one_in() -> None:
    async with running() as (run, stub):
        calls = [
            await connected(stub, f"sidecar~10.0.0.{n}~web-{n}.demo~demo.svc.x") for n in range(20)
        ]
        stopping = asyncio.create_task(run.server.stop())
        await asyncio.sleep(0)
        assert run.server.retired
        ends = [asyncio.wait_for(call.read(), PATIENCE_S) for call in calls]
        assert set(await asyncio.gather(*ends)) == {EOF}
        assert {await call.code() for call in calls} == {grpc.StatusCode.OK}
        await stopping
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{run.port}", options) as channel:
            late = channel.stream_stream("/a.B/C")()
            assert await asyncio.wait_for(late.code(), PATIENCE_S) is grpc.StatusCode.UNAVAILABLE


async def test_client_that_never_reads_is_cut_with_its_connection() -> None:
    big = {f"r{n}": ("web", n) for n in range(5000)}
    options = (("grpc.http2.bdp_probe", 0),)
    limits = Limits(stream_age_s=0.2, stuck_s=0.1)
    async with running(world(routes=big, listeners={}), options=options, limits=limits) as (
        run,
        stub,
    ):
        stuck = stub.DeltaAggregatedResources()
        await stuck.write(first(ROUTE, resource_names_subscribe=list(big)))
        async with asyncio.timeout(PATIENCE_S):
            while b"redirector_xds_clients 1.0" not in run.server.metrics():
                await asyncio.sleep(0.01)
            while b"redirector_xds_clients 0.0" not in run.server.metrics():
                await asyncio.sleep(0.01)


async def test_clients_that_go_in_the_middle_of_a_message_leave_no_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    big = {f"r{n}": ("web", n) for n in range(2000)}
    async with running(world(routes=big, listeners={})) as (run, good):
        for _ in range(5):
            options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{run.port}", options) as channel:
                stub = AggregatedDiscoveryServiceStub(channel)
                for _ in range(20):
                    call = stub.DeltaAggregatedResources()
                    await call.write(first(ROUTE, resource_names_subscribe=list(big)))
        async with asyncio.timeout(PATIENCE_S):
            while b"redirector_xds_clients 0.0" not in run.server.metrics():
                await asyncio.sleep(0.01)
        await connected(good)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_client_that_takes_nothing_does_not_hold_up_the_end() -> None:
    big = {f"r{n}": ("web", n) for n in range(5000)}
    options = (("grpc.http2.bdp_probe", 0),)
    async with running(world(routes=big, listeners={}), options=options) as (run, stub):
        stuck = stub.DeltaAggregatedResources()
        await stuck.write(first(ROUTE, resource_names_subscribe=list(big)))
        good = await connected(stub)
        await asyncio.wait_for(run.server.stop(grace=0.2), PATIENCE_S)
        assert await asyncio.wait_for(good.read(), PATIENCE_S) is EOF
        assert await good.code() is grpc.StatusCode.OK
