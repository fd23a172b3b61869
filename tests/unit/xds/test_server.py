"""The server over real gRPC, with clients that speak the protocol by hand."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

import grpc
import pytest
from clients import EOF, NODE, PATIENCE_S, ack, answer, connected, first, running
from envoy.service.cluster.v3.cds_pb2_grpc import ClusterDiscoveryServiceStub
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from envoy.service.discovery.v3.discovery_pb2 import (
    DiscoveryRequest,
)
from envoy.service.endpoint.v3.eds_pb2_grpc import EndpointDiscoveryServiceStub
from envoy.service.listener.v3.lds_pb2_grpc import ListenerDiscoveryServiceStub
from envoy.service.route.v3.rds_pb2_grpc import RouteDiscoveryServiceStub
from worlds import Resources, world
from xds_server.generation import Generation, InconsistentSnapshot
from xds_server.ir import NodeId
from xds_server.methods import AGGREGATED
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE, kind
from xds_server.server import MAX_REQUEST_BYTES, Server

from redirector.errors import RedirectorError


async def test_change_is_sent_and_reported_with_its_answer() -> None:
    async with running() as (run, stub):
        call = await connected(stub)
        await run.publish(world(clusters={"web": 1}))
        response = await answer(call)
        assert [resource.name for resource in response.resources] == ["web"]
        await call.write(ack(response))
        push = await run.report()
        assert push.changed == ("cluster web",)
        assert (len(push.reached), push.nacks, push.waiting) == (1, [], set())
        assert push.last_answer is not None
        assert push.last_answer >= push.changed_at
        assert push.summary().startswith("pushed 1 change to 1 sidecar, last ACK after ")


async def test_change_that_concerns_nobody_is_reported_at_once() -> None:
    async with running() as (run, stub):
        await connected(stub)
        await run.publish(world())
        push = await run.report()
        assert (push.changed, push.reached, push.last_answer) == ((), {}, None)
        assert '"last_ack_ms": null' in push.event()


async def test_nack_is_reported_with_client_and_reason() -> None:
    async with running() as (run, stub):
        call = await connected(stub)
        await run.publish(world(clusters={"web": 1}))
        response = await answer(call)
        await call.write(ack(response, "no such\nfilter"))
        push = await run.report()
        (nack,) = push.nacks
        assert nack.startswith("web.demo: cluster ")
        assert nack.endswith(": no such\nfilter")
        assert ", 1 NACK" in push.summary()


async def test_client_that_does_not_answer_is_named() -> None:
    async with running(report_after=0.05) as (run, stub):
        call = await connected(stub)
        await run.publish(world(clusters={"web": 1}))
        await answer(call)
        push = await run.report()
        assert [str(client) for client in push.waiting] == ["web.demo"]
        assert "no answer yet from web.demo" in push.summary()


async def test_client_that_leaves_is_not_waited_for() -> None:
    async with running() as (run, stub):
        call = await connected(stub)
        await run.publish(world(clusters={"web": 1}))
        await answer(call)
        call.cancel()
        push = await run.report()
        assert (len(push.reached), push.waiting, push.last_answer) == (1, set(), None)


async def test_client_that_ends_its_side_is_let_go() -> None:
    async with running() as (_, stub):
        call = await connected(stub)
        await call.done_writing()
        assert await asyncio.wait_for(call.code(), PATIENCE_S) == grpc.StatusCode.OK


async def test_two_clients_are_both_waited_for() -> None:
    async with running() as (run, stub):
        calls = [await connected(stub, NODE.replace("web", name)) for name in ("a", "b")]
        await run.publish(world(clusters={"web": 1}))
        for call in calls:
            await call.write(ack(await answer(call)))
        push = await run.report()
        assert sorted(str(client) for client in push.reached) == ["a.demo", "b.demo"]


async def test_each_node_is_translated_once_and_shared_resources_encoded_once() -> None:
    shared, asked = world(), []

    def translate(node: NodeId) -> Resources:
        asked.append(node.pod)
        return shared

    generation = Generation(translate)
    for name in ("a", "b", "a"):
        generation.snapshot(NodeId("10.0.0.1", name, "demo"))
    assert asked == ["a", "b"]
    assert generation.encodings == 4


@pytest.mark.parametrize("node", ["", "envoy-1", "sidecar~nowhere~web.demo~demo.svc.x"])
async def test_node_id_that_is_none_is_refused_in_one_line(node: str) -> None:
    async with running() as (_, stub):
        call = stub.DeltaAggregatedResources()
        await call.write(first(CLUSTER, node))
        assert await asyncio.wait_for(call.code(), PATIENCE_S) == grpc.StatusCode.INVALID_ARGUMENT
        assert f"node id {node!r}" in await call.details()


async def test_what_is_no_request_ends_its_stream_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    garbage = b"\xff\xff garbage"

    async def code(call: Any) -> grpc.StatusCode:
        with suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        found: grpc.StatusCode = await call.code()
        return found

    async with (
        running() as (started, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{started.port}") as channel,
    ):
        for sent in ([garbage], [first(CLUSTER).SerializeToString(), garbage]):
            call = channel.stream_stream(f"/{AGGREGATED}/DeltaAggregatedResources")(iter(sent))
            ended = await asyncio.wait_for(code(call), PATIENCE_S)
            assert ended == grpc.StatusCode.INVALID_ARGUMENT
    assert "refused a client: Error parsing message" in caplog.text
    assert [record.message for record in caplog.records if _is_ours(record)] == []


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether it tells of an error that is not gRPC's own: it has one queue of events for all event
    loops of a process, and an event of the loop of a test before, which is closed, is an error
    of whoever looks into the queue (PollerCompletionQueue)."""
    return record.exc_info is not None and "PollerCompletionQueue" not in record.getMessage()


async def test_first_node_of_envoys_size_passes_and_one_beyond_the_limit_does_not() -> None:
    async with running() as (_, stub):
        request = first(CLUSTER)
        request.node.extensions.add(name="x" * 61_000)
        call = stub.DeltaAggregatedResources()
        await call.write(request)
        assert len((await answer(call)).resources) == 1

        request.node.extensions.add(name="x" * MAX_REQUEST_BYTES)
        call = stub.DeltaAggregatedResources()
        await call.write(request)
        assert await asyncio.wait_for(call.code(), PATIENCE_S) == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_inconsistent_state_is_refused_before_anybody_sees_it() -> None:
    lacking = dict(world())
    lacking[ENDPOINT] = {}
    async with running() as (run, stub):
        call = await connected(stub)
        with pytest.raises(InconsistentSnapshot, match="cluster 'web' names endpoints 'web'"):
            await run.publish(lacking)
        await run.publish(world(clusters={"web": 2}))
        assert (await answer(call)).resources[0].name == "web"


async def test_state_that_cannot_be_made_for_a_new_client_is_an_error_to_it_alone() -> None:
    def translate(node: NodeId) -> Resources:
        if node.pod == "odd":
            raise RedirectorError("pod odd: cannot be served")
        return world()

    server = Server(Generation(translate), report=lambda _: None)
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = AggregatedDiscoveryServiceStub(channel)
        call = stub.DeltaAggregatedResources()
        await call.write(first(CLUSTER, NODE.replace("web", "odd")))
        assert await asyncio.wait_for(call.code(), PATIENCE_S) == grpc.StatusCode.INTERNAL
        assert await call.details() == "pod odd: cannot be served"
        await connected(stub)
    await server.stop(grace=0)


async def test_stopping_ends_streams_in_good_order() -> None:
    async with running() as (run, stub):
        call = await connected(stub)
        await run.server.stop()
        assert await asyncio.wait_for(call.read(), PATIENCE_S) is EOF
        assert await call.code() == grpc.StatusCode.OK


async def test_client_that_reads_nothing_skips_the_states_in_between() -> None:
    """Its flow-control window is full after the first bytes; memory does not pile up for it."""
    names = [f"r{n}" for n in range(1000)]
    changed = 40

    def big(variant: int) -> Resources:
        return world(routes=dict.fromkeys(names, ("web", variant)), listeners={})

    # Without the probing for a larger window, what a client leaves unread stops the server soon.
    options = (("grpc.http2.bdp_probe", 0),)
    async with running(big(0), options=options) as (run, stub):
        call = stub.DeltaAggregatedResources()
        await call.write(first(ROUTE, resource_names_subscribe=names))
        for variant in range(1, changed + 1):
            await run.publish(big(variant))
        versions = set()
        last = Generation(lambda _: big(changed))
        wanted = last.snapshot(NodeId("10.0.0.1", "web", "demo")).of(ROUTE)
        while True:
            response = await answer(call)
            versions.add(response.system_version_info)
            if response.system_version_info == wanted.version:
                break
        assert {r.name: r.version for r in response.resources} == {
            name: entry.version for name, entry in wanted.items()
        }
        assert len(versions) < changed / 2


async def test_state_of_the_world_over_the_wire() -> None:
    async with running() as (run, stub):
        call = stub.StreamAggregatedResources()
        request = DiscoveryRequest(type_url=CLUSTER, resource_names=["web"])
        request.node.id = NODE
        await call.write(request)
        response = await answer(call)
        assert (response.type_url, len(response.resources)) == (CLUSTER, 1)
        await call.write(
            DiscoveryRequest(
                type_url=CLUSTER,
                resource_names=["web"],
                version_info=response.version_info,
                response_nonce=response.nonce,
            )
        )
        await run.publish(world(clusters={"web": 1}))
        changed = await answer(call)
        assert changed.resources[0].value == world(clusters={"web": 1})[CLUSTER][
            "web"
        ].SerializeToString(deterministic=True)
        assert changed.version_info != response.version_info


PER_TYPE = {
    CLUSTER: (ClusterDiscoveryServiceStub, "Clusters", "web"),
    ENDPOINT: (EndpointDiscoveryServiceStub, "Endpoints", "web"),
    LISTENER: (ListenerDiscoveryServiceStub, "Listeners", "in"),
    ROUTE: (RouteDiscoveryServiceStub, "Routes", "to-web"),
}


@pytest.mark.parametrize("type_url", PER_TYPE, ids=kind)
async def test_each_type_has_a_service_of_its_own(type_url: str) -> None:
    stub, method, name = PER_TYPE[type_url]
    changed = world(
        clusters={"web": 1},
        ports={"web": 9000},
        routes={"to-web": ("web", 1)},
        listeners={"in": ("to-web", 1)},
    )
    async with (
        running() as (run, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{run.port}") as channel,
    ):
        # The type may be left out: the method says it.
        delta = getattr(stub(channel), f"Delta{method}")()
        await delta.write(first("", resource_names_subscribe=[name]))
        sent = await answer(delta)
        assert (sent.type_url, [entry.name for entry in sent.resources]) == (type_url, [name])
        await delta.write(ack(sent))

        whole = getattr(stub(channel), f"Stream{method}")()
        request = DiscoveryRequest(type_url=type_url, resource_names=[name])
        request.node.id = NODE
        await whole.write(request)
        assert len((await answer(whole)).resources) == 1

        await run.publish(changed)
        sent = await answer(delta)
        await delta.write(ack(sent))
        (resource,) = sent.resources
        assert resource.name == name
        (body,) = (await answer(whole)).resources
        assert body == resource.resource

        await run.publish(world(clusters={}, routes={}, listeners={}))
        assert list((await answer(delta)).removed_resources) == [name]


async def test_method_of_one_type_serves_no_other() -> None:
    async with (
        running() as (run, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{run.port}") as channel,
    ):
        call = ClusterDiscoveryServiceStub(channel).DeltaClusters()
        await call.write(first(ROUTE, resource_names_subscribe=["to-web"]))
        assert await asyncio.wait_for(call.code(), PATIENCE_S) == grpc.StatusCode.INVALID_ARGUMENT
        assert "this method serves" in await call.details()
