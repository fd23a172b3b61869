"""Clients that mean no good: clear refusals, bounds that hold, and nobody else is troubled."""

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from clients import EOF, NODE, PATIENCE_S, ack, answer, connected, first, running
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DiscoveryRequest
from manifest_server import ManifestServer
from worlds import world
from xds_server.admission import Limits
from xds_server.methods import AGGREGATED
from xds_server.references import CLUSTER, ENDPOINT, ROUTE

MIB = 1 << 20


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """How the stream ends; that is learnt after what came before is read."""
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while await asyncio.wait_for(call.read(), PATIENCE_S) is not EOF:
            pass
    code: grpc.StatusCode = await asyncio.wait_for(call.code(), PATIENCE_S)
    return code, await call.details()


async def pour(call: Any, requests: Iterable[Any]) -> tuple[grpc.StatusCode, str]:
    """Write until the stream ends, which it must; read meanwhile, since the end comes last."""
    end = asyncio.ensure_future(refusal(call))
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for request in requests:
            writing = asyncio.ensure_future(call.write(request))
            await asyncio.wait({writing, end}, return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                writing.cancel()
                break
            await writing
    return await end


async def test_names_add_up_over_requests() -> None:
    async with running(limits=Limits(names=1000)) as (_, stub):
        call = stub.DeltaAggregatedResources()
        # There are four resources, and each may be named four times.
        for step in range(3):
            asked = [f"{step}-{n}" for n in range(400)]
            await call.write(first(ENDPOINT, resource_names_subscribe=asked))
        assert await refusal(call) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "asks for 1200 names; 1016 is the most",
        )


@pytest.mark.parametrize("way", ["names", "versions", "dropped", "sotw"])
async def test_names_are_bounded_in_whatever_field_they_come(way: str) -> None:
    names = [f"n{n}" for n in range(27)]
    async with running(limits=Limits(names=10)) as (_, stub):
        if way == "sotw":
            call = stub.StreamAggregatedResources()
            request = DiscoveryRequest(type_url=ENDPOINT, resource_names=names)
            request.node.id = NODE
            await call.write(request)
        else:
            fields: dict[str, Any] = {"resource_names_subscribe": names}
            if way == "versions":
                fields = {"initial_resource_versions": dict.fromkeys(names, "1")}
            elif way == "dropped":
                fields = {"resource_names_unsubscribe": names}
            call = stub.DeltaAggregatedResources()
            await call.write(first(CLUSTER, **fields))
        assert (await refusal(call))[1] == "asks for 27 names; 26 is the most"


async def test_names_that_take_the_place_of_others_do_not_add_up() -> None:
    async with running(limits=Limits(names=10)) as (_, stub):
        call, nonce = stub.StreamAggregatedResources(), ""
        for turn in range(5):
            names = ["web", *(f"n{turn}-{n}" for n in range(9))]
            request = DiscoveryRequest(type_url=CLUSTER, resource_names=names)
            request.node.id = NODE
            request.response_nonce = nonce
            await call.write(request)
            found = await answer(call)
            assert len(found.resources) == 1
            nonce = found.nonce


async def test_many_names_in_a_loop_cost_their_sender_and_no_other() -> None:
    async with running(limits=Limits(requests=20)) as (run, stub):
        other = await connected(stub)
        hostile, begun = stub.DeltaAggregatedResources(), time.monotonic()
        answers: list[int] = []
        names = [f"nowhere-{n}" for n in range(5000)]
        end = asyncio.Event()

        async def read() -> None:
            while (found := await hostile.read()) is not EOF:
                answers.append(len(found.removed_resources))
                await hostile.write(ack(found))

        async def write() -> None:
            while not end.is_set():
                await hostile.write(first(ENDPOINT, resource_names_subscribe=names))

        tasks = [asyncio.create_task(read()), asyncio.create_task(write())]
        async with asyncio.timeout(PATIENCE_S):
            while not answers:
                await asyncio.sleep(0.01)
        for variant in range(1, 20):
            await run.publish(world(clusters={"web": variant}))
            found = await answer(other)
            assert [each.name for each in found.resources] == ["web"]
            await other.write(ack(found))
        assert set(answers) == {len(names)}
        # 51 tokens each, of 200 at once and 20 a second; the first and the last one come before.
        assert len(answers) <= (200 + 20 * (time.monotonic() - begun)) / 51 + 2
        end.set()
        hostile.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_long_names_and_many_types_are_refused() -> None:
    async with running() as (_, stub):
        call = stub.DeltaAggregatedResources()
        await call.write(first(ROUTE, resource_names_subscribe=["x" * 1025]))
        assert await refusal(call) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "asks for a name of more than 1024 characters",
        )
        call = stub.DeltaAggregatedResources()
        # The four that there are count, too.
        for number in range(29):
            await call.write(first(f"type.googleapis.com/made.Up{number}"))
        assert (await refusal(call))[1] == "asks for more than 32 types"


@pytest.mark.parametrize("method", ["DeltaAggregatedResources", "StreamAggregatedResources"])
async def test_who_asks_for_no_type_is_told(method: str) -> None:
    async with running() as (_, stub):
        call = getattr(stub, method)()
        made = DeltaDiscoveryRequest if method.startswith("Delta") else DiscoveryRequest
        request = made()
        request.node.id = NODE
        await call.write(request)
        code = grpc.StatusCode.INVALID_ARGUMENT
        assert await refusal(call) == (code, "asks for no type; set type_url")


async def test_who_says_nothing_is_let_go() -> None:
    async with running(limits=Limits(first_request_s=0.1)) as (_, stub):
        silent = stub.DeltaAggregatedResources()
        assert await refusal(silent) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "no request within 0.1 s",
        )
        await connected(stub)


async def test_who_comes_too_many_is_refused_and_may_come_when_others_went() -> None:
    async with running(limits=Limits(clients=2)) as (_, stub):
        one, _two = await connected(stub), await connected(stub)
        third = stub.DeltaAggregatedResources()
        await third.write(first(CLUSTER))
        assert await refusal(third) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "2 clients are connected already; raise --max-clients or add servers",
        )
        await one.done_writing()
        await asyncio.wait_for(one.code(), PATIENCE_S)
        await connected(stub)


async def test_answers_to_what_was_never_sent_mean_nothing() -> None:
    async with running() as (run, stub):
        call = await connected(stub)
        for nonce in ("999", "0", "-1", "1", "", "x" * 10_000):
            request = DeltaDiscoveryRequest(type_url=CLUSTER, response_nonce=nonce)
            await call.write(request)
            request.error_detail.message = "no"
            await call.write(request)
        await run.publish(world(clusters={"web": 1}))
        response = await answer(call)
        assert [resource.name for resource in response.resources] == ["web"]
        await call.write(ack(response))
        assert (await run.report()).nacks == []


async def test_client_that_answers_nothing_is_sent_no_more_until_it_does() -> None:
    async with running(limits=Limits(unanswered=3)) as (_, stub):
        call = stub.DeltaAggregatedResources()
        await call.write(first(CLUSTER))
        held = [await answer(call)]
        for _ in range(20):
            await call.write(
                DeltaDiscoveryRequest(type_url=CLUSTER, resource_names_subscribe=["web"])
            )
        held += [await answer(call), await answer(call)]
        reading = asyncio.create_task(call.read())
        # A round trip on the same connection: all that was asked before has been taken in.
        await connected(stub)
        await connected(stub)
        assert not reading.done()
        await call.write(ack(held[0]))
        response = await asyncio.wait_for(reading, PATIENCE_S)
        assert [resource.name for resource in response.resources] == ["web"]


async def test_flood_of_requests_is_read_at_a_bounded_rate() -> None:
    """What is not read fills the flooder's own window; others are served meanwhile."""
    async with running(limits=Limits(requests=5.0)) as (run, stub):
        flooder = stub.DeltaAggregatedResources()
        await flooder.write(first(CLUSTER))
        await answer(flooder)
        for _ in range(200):
            request = DeltaDiscoveryRequest(type_url=CLUSTER, response_nonce="never")
            await flooder.write(request)
        call = await connected(stub)
        await run.publish(world(clusters={"web": 1}))
        await answer(call)
        flooder.cancel()


# What follows is done to the server as a process of its own, whose memory is looked at.


Attack = Callable[[int, random.Random], Awaitable[None]]


@asynccontextmanager
async def channel_to(port: int) -> AsyncIterator[Any]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        yield channel


async def raw(port: int, chance: random.Random) -> None:
    """Bytes that are no HTTP/2, and HTTP/2 that goes astray."""
    for turn in range(60):
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
        with socket.create_connection(("127.0.0.1", port)) as connection, suppress(OSError):
            connection.sendall((preface if turn % 2 else b"") + chance.randbytes(4096))
        await asyncio.sleep(0)


async def garbage(port: int, chance: random.Random) -> None:
    """Messages of random bytes, and random ones that are well-formed."""
    async with channel_to(port) as channel:
        for turn in range(100):
            method = ("Delta", "Stream")[turn % 2]
            call = channel.stream_stream(f"/{AGGREGATED}/{method}AggregatedResources")()
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(first(CLUSTER).SerializeToString())
                for _ in range(5):
                    request = DeltaDiscoveryRequest(
                        type_url=chance.choice((CLUSTER, ROUTE, "", "x" * 999)),
                        response_nonce=str(chance.randrange(5)),
                        resource_names_subscribe=[str(chance.random())] * chance.randrange(3),
                        resource_names_unsubscribe=chance.choices(["*", "", "web"]),
                        initial_resource_versions={chance.choice(["*", "a"]): "v"},
                    )
                    await call.write(request.SerializeToString())
                await call.write(chance.randbytes(chance.randrange(1, 2000)))
                await refusal(call)
            call.cancel()


async def huge(port: int, _: random.Random) -> None:
    """A node of 10 MB, and many just below the limit of a message."""
    async with channel_to(port) as channel:
        stub = AggregatedDiscoveryServiceStub(channel)
        for size in (10_000_000, *[4_000_000] * 10):
            request = first(CLUSTER)
            request.node.user_agent_name = "x" * size
            call = stub.DeltaAggregatedResources()
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(request)
            if size > 4 * MIB:
                assert (await refusal(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def names(port: int, _: random.Random) -> None:
    """A million names."""
    async with channel_to(port) as channel:
        call = AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources()
        steps = (
            first(ENDPOINT, resource_names_subscribe=[f"{s}-{n}" for n in range(100_000)])
            for s in range(10)
        )
        # Whoever writes on after the refusal may not see it.
        assert (await pour(call, steps))[0] is not grpc.StatusCode.OK


async def deaf(port: int, _: random.Random) -> None:
    """Asks for everything, again and again, and reads nothing."""
    async with channel_to(port) as channel:
        stub = AggregatedDiscoveryServiceStub(channel)
        calls = [stub.DeltaAggregatedResources() for _ in range(50)]
        for call in calls:
            for _ in range(100):
                await call.write(first(CLUSTER, resource_names_subscribe=["*"]))


async def streams(port: int, _: random.Random) -> None:
    """Thousands of streams on one connection."""
    async with channel_to(port) as channel:
        stub = AggregatedDiscoveryServiceStub(channel)
        calls = [stub.DeltaAggregatedResources() for _ in range(2000)]
        writes = [asyncio.ensure_future(call.write(first(CLUSTER))) for call in calls]
        await asyncio.wait(writes, timeout=1)
        for writing in writes:
            writing.cancel()
        for call in calls:
            call.cancel()


async def acknowledging(port: int, _: random.Random) -> None:
    """Answers to what was never sent, as fast as they are taken."""
    async with channel_to(port) as channel:
        call = AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources()
        await call.write(first(CLUSTER))
        for nonce in range(2000):
            await call.write(DeltaDiscoveryRequest(type_url=CLUSTER, response_nonce=str(nonce)))


ATTACKS: tuple[Attack, ...] = (raw, garbage, huge, names, deaf, streams, acknowledging)
#: What all of that together may cost, beside what the server needs anyway.
MOST_MIB = 200


async def test_server_bears_all_of_it_and_serves_the_good_meanwhile(tmp_path: Path) -> None:
    chance = random.Random(15001)
    with ManifestServer(tmp_path) as server:
        async with channel_to(server.port) as channel:
            stub = AggregatedDiscoveryServiceStub(channel)
            call = stub.DeltaAggregatedResources()
            await call.write(first(ROUTE, server.node, resource_names_subscribe=[server.route]))
            await call.write(ack(await answer(call)))
            before = server.peak_memory()
            for turn, attack in enumerate(ATTACKS):
                running = asyncio.create_task(attack(server.port, chance))
                server.change_weight(turn + 1)
                response = await answer(call)
                assert [resource.name for resource in response.resources] == [server.route]
                await call.write(ack(response))
                await asyncio.wait_for(running, 60)
            cost = server.peak_memory() - before
        assert server.stop() == 0
    assert "Traceback" not in server.log
    assert cost < MOST_MIB * MIB, f"{cost / MIB:.0f} MiB"
