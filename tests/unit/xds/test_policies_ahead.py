"""A policy that is there before the Service that it is for: at no moment is the Service served
without it."""

import asyncio
from collections.abc import AsyncGenerator
from itertools import permutations
from typing import Any

import pytest
from clients import PATIENCE_S, Running, ack, answer, first, running
from test_ingest import POD, POLICY, SERVICE, SLICE
from test_ingest_harm import OTHER, step
from xds_server import following
from xds_server.ahead import policies_ahead
from xds_server.errors import Problem
from xds_server.following import Reader, follow
from xds_server.ingest import Ingester
from xds_server.ir import Name
from xds_server.lineage import Lineage
from xds_server.references import LISTENER, ROUTE
from xds_server.sources.files import parse
from xds_server.sources.objects import KubeObject
from xds_server.sources.source import Change
from xds_server.telling import Telling

POD_1 = Name("demo", "web-1")
AIMED = POLICY.replace(
    "selector: {matchLabels: {app: web}}", "targetRefs: [{kind: Service, name: web}]"
)
PLAIN = SERVICE.replace("clusterIP", "selector: {app: web}, clusterIP")
#: As an API server has it whose Service selects nothing: its pods are known by its slices.
SLICED = SERVICE
SIDECAR = "sidecar~10.77.0.1~web-1.demo~demo.svc.cluster.local"
CLIENT = "sidecar~10.77.0.9~client.demo~demo.svc.cluster.local"
CLIENT_POD = (
    POD.replace("web-1", "client")
    .replace("10.77.0.1", "10.77.0.9")
    .replace("app: web", "app: client")
)


@pytest.mark.parametrize("service", [PLAIN, SLICED], ids=["selector", "slices"])
def test_in_whatever_order_the_objects_come_no_endpoint_is_served_without_its_policy(
    service: str,
) -> None:
    for order in permutations([AIMED, service, POD, SLICE]):
        ingester = Ingester()
        for number in range(order.index(AIMED) + 1, len(order) + 1):
            mesh, _ = step(ingester, *order[:number])
            endpoints = [e for s in mesh.services.values() for p in s.ports for e in p.endpoints]
            # A pod that is not known is closed as soon as any policy chooses pods.
            (policy,) = mesh.policies
            known = POD_1 in mesh.workloads
            assert policy.targets is not None
            assert not endpoints or not known or POD_1 in policy.targets, order[:number]


def test_of_a_known_and_an_unknown_target_the_known_one_has_the_policy() -> None:
    both = AIMED.replace("name: web}]", "name: web}, {kind: Service, name: other}]")
    ingester = Ingester()
    mesh, problems = step(ingester, PLAIN, POD, SLICE, both)
    assert ["there is no Service demo/other" in str(problem) for problem in problems] == [True]
    assert mesh.policies[0].targets == {POD_1}
    (status,) = (status for status in mesh.statuses if "AuthorizationPolicy" in status.subject)
    told = {parent.parent.name: parent.conditions[0] for parent in status.parents}
    assert (told["web"].status, told["other"].reason) == (True, "TargetNotFound")
    second = POD.replace("web-1", "other-1").replace("app: web", "app: other")
    mesh, problems = step(
        ingester,
        PLAIN,
        POD,
        SLICE,
        both,
        OTHER.replace("clusterIP", "selector: {app: other}, clusterIP"),
        second.replace("10.77.0.1", "10.77.0.2"),
    )
    assert problems == []
    assert mesh.policies[0].targets == {POD_1, Name("demo", "other-1")}


def test_nothing_goes_ahead_without_need() -> None:
    ingester = Ingester()
    none, _ = step(ingester, POD)
    lonely, _ = step(ingester, POD, AIMED)
    whole, _ = step(ingester, POD, AIMED, PLAIN, SLICE)
    assert policies_ahead(none, lonely) is None
    assert policies_ahead(whole, whole) is None
    assert policies_ahead(whole, lonely) is None
    between = policies_ahead(lonely, whole)
    assert between is not None
    assert (between.policies, between.services) == (whole.policies, {})


class Script:
    """A source whose objects a test changes."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts
        self._changed = asyncio.Event()

    def __str__(self) -> str:
        return "a script"

    async def read(self) -> tuple[list[KubeObject], list[Problem]]:
        return parse("f.yaml", "\n---\n".join(self._texts))

    async def changes(self) -> AsyncGenerator[Change, None]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            yield Change("changed f.yaml", 0.0)

    def becomes(self, *texts: str) -> None:
        self._texts = texts
        self._changed.set()


async def _followed(run: Running, script: Script) -> "asyncio.Task[None]":
    reader, lineage = Reader(script), Lineage()
    found = await reader.read()
    await run.server.publish(lineage.next(found.mesh), "start", 0.0)
    return asyncio.create_task(follow(reader, lineage, run.server, Telling()))


async def _asked(stub: Any, node: str, type_url: str, **asked: Any) -> Any:
    call = stub.DeltaAggregatedResources()
    await call.write(first(type_url, node, **asked))
    await call.write(ack(await answer(call)))
    return call


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "hangs"])
async def test_clients_learn_of_a_service_when_the_sidecars_behind_it_have_its_policies(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_AHEAD_S", PATIENCE_S if answers else 0.1)
    pod = POD.replace("containerPort: 8080", "name: http, containerPort: 8080")
    objects = (pod, CLIENT_POD, AIMED)
    async with running({}) as (run, stub):
        script = Script(*objects)
        task = await _followed(run, script)
        client = await _asked(stub, CLIENT, LISTENER)
        server = await _asked(stub, SIDECAR, ROUTE, resource_names_subscribe=["inbound"])
        script.becomes(*objects, PLAIN, SLICE)
        told = asyncio.ensure_future(answer(client))
        policies = await answer(server)
        assert b"demo/web/0" in policies.resources[0].resource.value
        if answers:
            await asyncio.sleep(0.2)
            assert not told.done()
            await server.write(ack(policies))
        assert b"outbound|80|web.demo" in (await told).resources[0].resource.value
        task.cancel()
