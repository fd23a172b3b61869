"""A cluster's objects, as its API server tells them, are what the files would have said."""

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_golden
from apiserver import KINDS, ApiServer, Fault, namespace, pod
from xds_server.ingest import ingest
from xds_server.ir import NodeId
from xds_server.sources import kubernetes
from xds_server.sources.files import load, parse
from xds_server.sources.kubernetes import Kubernetes
from xds_server.sources.resources import KINDS as FOLLOWED
from xds_server.sources.source import Change
from xds_server.translate import translate

from redirector.apiserver.client import Access, Client
from redirector.apiserver.reflector import Backoff

DEMO = Path(__file__).parents[3] / "manifests" / "demo"
PATIENCE_S = 20.0
NEVER_S = 3600.0
#: The one that is left out has a Service twice, which a cluster cannot have.
SAME = [name for name in test_golden.NAMES if name != "problems"]


def documents(path: Path) -> list[dict[str, Any]]:
    return [each.data for each in parse(str(path), path.read_text())[0]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff.__init__, "__defaults__", (0.02, 0.1))


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        yield made


@pytest.fixture
def demo(server: ApiServer) -> ApiServer:
    for path in sorted(DEMO.glob("*.yaml")):
        server.apply(*documents(path))
    return server


_followed: list[Kubernetes] = []


def follow(server: ApiServer) -> Kubernetes:
    """A source that ends with the test."""
    _followed.append(Kubernetes(Client(Access(server.url)), server.url))
    return _followed[-1]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while _followed:
        _followed.pop().close()


class Changes:
    """What a source tells, one by one."""

    def __init__(self, source: Kubernetes) -> None:
        self._changes: AsyncIterator[Change] = source.changes()

    async def next(self) -> str:
        return (await asyncio.wait_for(anext(self._changes), PATIENCE_S)).reason


async def names(source: Kubernetes) -> set[str]:
    objects, problems = await source.read()
    assert problems == []
    return {f"{o.data['kind']} {o.data['metadata']['name']}" for o in objects}  # type: ignore[index]


@pytest.mark.parametrize("name", SAME)
async def test_files_and_api_give_the_same(server: ApiServer, name: str) -> None:
    """So nothing is cut away that anything is made of."""
    file = test_golden.GOLDEN / f"{name}.in.yaml"
    server.apply(*documents(file))
    objects, _ = await asyncio.wait_for(follow(server).read(), PATIENCE_S)
    node = file.read_text().splitlines()[0].removeprefix("# node: ")
    mesh, problems = ingest(objects)
    expected, resources, others = test_golden.outcome(name)
    assert {(p.object, p.field) for p in problems} == {(p.object, p.field) for p in others}
    assert (mesh.left_out, mesh.closed) == (expected.left_out, expected.closed)
    assert translate(mesh, NodeId.parse(node)) == resources


async def test_every_object_of_the_demo_arrives(demo: ApiServer) -> None:
    objects, _ = load(DEMO)
    expected = {f"{o.data['kind']} {o.data['metadata']['name']}" for o in objects}  # type: ignore[index]
    assert await names(follow(demo)) == expected
    assert {kind.plural for kind in FOLLOWED} == set(KINDS)


@pytest.mark.parametrize("late", list(KINDS))
async def test_nothing_is_known_before_the_last_list(demo: ApiServer, late: str) -> None:
    demo.fail("list", late, *[Fault.ERROR, Fault.BROKEN] * 1000)
    source = follow(demo)
    reading = asyncio.create_task(source.read())
    # Without namespaces nobody knows which cluster answers.
    others = [kind for kind in KINDS if late not in (kind, "namespaces")]
    await asyncio.to_thread(
        demo.wait_for,
        lambda: demo.seen("list", late) >= 3 and all(demo.seen("watch", kind) for kind in others),
    )
    assert not reading.done()
    demo.faults.clear()
    objects, _ = await asyncio.wait_for(reading, PATIENCE_S)
    assert len(objects) == sum(map(len, demo.objects.values()))


async def test_kinds_without_a_definition_are_empty_until_it_comes(
    demo: ApiServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("redirector.apiserver.reflector.MISSING_SECONDS", 0.05)
    demo.undefined |= {"httproutes", "trafficpolicies"}
    source = follow(demo)
    assert "HTTPRoute web" not in await names(source)
    assert caplog.text.count("httproutes: the server does not have this kind (yet)") == 1
    demo.undefined.clear()
    assert await Changes(source).next() == "added HTTPRoute demo/web"
    assert "HTTPRoute web" in await names(source)


async def test_a_change_is_named_and_the_rest_stays_the_same_value(demo: ApiServer) -> None:
    source = follow(demo)
    before = {id(each): each.data["kind"] for each in (await source.read())[0]}
    changes = Changes(source)
    route = copy.deepcopy(demo.objects["httproutes"]["demo/web"])
    del route["spec"]["rules"][0]
    demo.put("httproutes", route)
    demo.delete("services", "demo/web-v2")
    found = await changes.next()
    while "removed" not in found:
        found += await changes.next()
    assert "changed HTTPRoute demo/web" in found
    assert "removed Service demo/web-v2" in found
    after = {id(each): each.data["kind"] for each in (await source.read())[0]}
    assert sorted(before[i] for i in before.keys() - after.keys()) == ["HTTPRoute", "Service"]
    assert [after[i] for i in after.keys() - before.keys()] == ["HTTPRoute"]


async def test_what_is_of_no_use_here_is_no_change(demo: ApiServer) -> None:
    """A kubelet's news of a pod, who wrote a field, a status of a route."""
    source = follow(demo)
    await source.read()
    changes = Changes(source)
    told = copy.deepcopy(demo.objects["pods"]["demo/client"])
    told["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    told["metadata"]["managedFields"] = [{"manager": "kubelet"}]
    told["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "{}"}
    demo.put("pods", told)
    demo.patch_status("httproutes", "demo/web", {"status": {"parents": []}})
    demo.apply(namespace("later"))
    assert await changes.next() == "added Namespace later"


async def test_nonsense_in_a_status_hides_nothing(demo: ApiServer) -> None:
    route = copy.deepcopy(demo.objects["httproutes"]["demo/web"])
    route["metadata"]["name"], route["status"] = "odd", "fine"
    demo.apply(route)
    assert {"HTTPRoute web", "HTTPRoute odd"} <= await names(follow(demo))


async def test_endpoints_do_not_wait_for_a_burst_to_end(
    demo: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "_QUIET_S", NEVER_S)
    monkeypatch.setattr(kubernetes, "_LONGEST_S", NEVER_S)
    source = follow(demo)
    await source.read()
    changes = Changes(source)
    demo.apply(*(namespace(f"n{number}") for number in range(100)))
    waiting = asyncio.create_task(changes.next())
    name, piece = next(iter(demo.objects["endpointslices"].items()))
    piece = copy.deepcopy(piece)
    piece["endpoints"] = []
    demo.put("endpointslices", piece)
    found = await waiting
    assert f"changed EndpointSlice {name}" in found


async def test_a_burst_is_one_change(demo: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "_QUIET_S", 1.0)
    monkeypatch.setattr(kubernetes, "_LONGEST_S", NEVER_S)
    source = follow(demo)
    await source.read()
    demo.apply(*(namespace(f"n{number}") for number in range(100)))
    found = await Changes(source).next()
    assert found.startswith("added Namespace n0, ")
    assert found.endswith(", 97 more")


async def test_a_server_in_trouble_leaves_the_last_state(demo: ApiServer) -> None:
    source = follow(demo)
    before = await names(source)
    for resource in KINDS:
        demo.fail("watch", resource, *Fault)
        demo.fail("list", resource, *Fault)
    demo.forget()
    demo.down()
    assert await names(source) == before
    demo.up()
    demo.apply(namespace("later"))
    changes = Changes(source)
    while "Namespace later" not in await names(source):
        assert before <= await names(source)
        await changes.next()
    assert await names(source) == before | {"Namespace later"}


async def test_an_empty_cluster_is_not_believed_at_once(demo: ApiServer) -> None:
    source = follow(demo)
    before = await names(source)
    for table in demo.objects.values():
        table.clear()
    demo.forget()
    lists = demo.seen("list", "pods")
    await asyncio.to_thread(demo.wait_for, lambda: demo.seen("list", "pods") > lists + 1)
    assert await names(source) == before
    assert any("none of the" in problem for problem in source.problems())


async def test_another_cluster_is_not_followed(
    demo: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = namespace("kube-system"), namespace("kube-system")
    demo.apply(own)
    source = follow(demo)
    before = await names(source)
    # Another one answers at its address: nothing is told of what is there no more.
    others = pod("theirs", "uid")
    other["metadata"] |= {"uid": "another", "resourceVersion": "1"}
    with demo.changed:
        mine = {**demo.objects}
        demo.objects |= {kind: {} for kind in KINDS}
        demo.objects["namespaces"] = {"kube-system": other}
        demo.objects["pods"] = {"default/theirs": others}
    demo.forget()
    async with asyncio.timeout(PATIENCE_S):
        while len(source.problems()) < len(KINDS):
            await asyncio.sleep(0.02)
    assert await names(source) == before
    assert caplog.text.count("is another one now") == 1
    # The first one is back.
    with demo.changed:
        demo.objects |= mine
    demo.apply(namespace("later"))
    assert "Namespace later" in await Changes(source).next()
    assert await names(source) == before | {"Namespace later"}
