"""Clients that claim to be others, where nobody proves who they are: they harm nobody else."""

import asyncio
from collections.abc import Callable

import pytest
from clients import PATIENCE_S, ack, answer, connected, first, running
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest
from worlds import cluster, world
from xds_server.generation import _NODES, Generation
from xds_server.ir import Client, Mesh, NodeId
from xds_server.lineage import Lineage
from xds_server.references import CLUSTER, LISTENER
from xds_server.standing import Sync

OTHER = "sidecar~10.0.0.9~api.demo~demo.svc.cluster.local"


@pytest.mark.parametrize("variant", ["delta", "sotw"])
async def test_what_a_liar_refuses_is_kept_from_nobody_else(variant: str) -> None:
    async with running() as (run, stub):
        honest, other = await connected(stub), await connected(stub, OTHER)
        liar = getattr(
            stub, "DeltaAggregatedResources" if variant == "delta" else "StreamAggregatedResources"
        )()

        def request(type_url: str, nonce: str = "") -> object:
            made = first(type_url) if variant == "delta" else DiscoveryRequest(type_url=type_url)
            made.node.id = first(type_url).node.id
            made.response_nonce = nonce
            if nonce:
                made.error_detail.message = "no"
            return made

        for type_url in (CLUSTER, LISTENER):
            await liar.write(request(type_url))
            await liar.write(request(type_url, (await answer(liar)).nonce))
        await run.publish(world(clusters={"web": 1}))
        # What it was not sent it cannot refuse, nor on a stream that is not its own.
        for nonce in map(str, range(1, 50)):
            await liar.write(request(CLUSTER, nonce))
        for client in (honest, other):
            found = await answer(client)
            assert [each.name for each in found.resources] == ["web"]
            await client.write(ack(found))
        liar.cancel()
        # Nor does it stay when the one whose name it took comes back.
        honest.cancel()
        again = stub.DeltaAggregatedResources()
        await again.write(first(CLUSTER))
        (found,) = (await answer(again)).resources
        assert found.resource.value == cluster("web", 1).SerializeToString(deterministic=True)


async def test_what_a_liar_refuses_that_the_pod_itself_has_taken_stands_in_no_status() -> None:
    async with running() as (run, stub):
        honest = await connected(stub)
        liar = stub.DeltaAggregatedResources()
        await liar.write(first(CLUSTER))
        await liar.write(ack(await answer(liar), error="no"))

        async def until(holds: Callable[[], bool]) -> None:
            async with asyncio.timeout(PATIENCE_S):
                while not holds():
                    await asyncio.sleep(0.01)

        def refusing() -> int:
            standings = run.server.standings()
            return sum(each.types[0].sync is Sync.NACKED for each in standings)

        await until(lambda: refusing() == 1)
        assert list(run.server.refused()) == []
        # Without it, its word is all that there is.
        honest.cancel()
        await until(lambda: len(run.server.standings()) == 1)
        assert [what.name for _, what in run.server.refused()] == ["web"]


def unknown(number: int, client: Client) -> NodeId:
    return NodeId("10.9.0.1", f"pod-{number}", f"made-up-{number % 1000}", client)


def test_names_that_clients_make_up_are_not_kept() -> None:
    lineage = Lineage()
    made = lineage.next(Mesh())
    for client in Client:
        made.snapshot(unknown(0, client))
    translated, encoded = lineage.translated, made.encodings
    for number in range(2000):
        for client in Client:
            assert made.snapshot(unknown(number, client)) is made.snapshot(unknown(0, client))
    assert (lineage.translated, made.encodings) == (translated, encoded)


def test_snapshots_are_kept_for_a_bounded_number_of_nodes() -> None:
    resources = world()
    made = Generation(lambda _: resources)
    nodes = [unknown(number, Client.ENVOY) for number in range(_NODES + 1)]
    made.prepare(nodes)
    assert made.ready(nodes[0]) is None
    assert made.ready(nodes[1]) is not None
    assert made.snapshot(nodes[0]).types.keys() == resources.keys()
