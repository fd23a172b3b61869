"""Statuses reach the objects at the API server, once, whatever the server or others do."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress

import pytest
from apiserver import ApiServer, Fault, Object, pod
from xds_server import writing
from xds_server.conditions import Condition, ObjectStatus, ParentStatus, Reference
from xds_server.ir import Mesh, Name, NodeId, Parent, Route
from xds_server.quarantine import Quarantined
from xds_server.references import ROUTE
from xds_server.sources.kubernetes import Kubernetes
from xds_server.writing import Writer

from redirector.apiserver.client import Access, Client
from redirector.apiserver.reflector import Backoff

PATIENCE_S = 20.0
WEB = Reference("", "Service", None, "web")
VERSION = "gateway.networking.k8s.io/v1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff.__init__, "__defaults__", (0.02, 0.1))
    monkeypatch.setattr(writing, "_JITTER_S", 0.01)
    monkeypatch.setattr(writing, "_LOOK_S", 0.05)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        yield made


def route(name: str, generation: int = 1) -> Object:
    metadata = {"name": name, "namespace": "demo", "generation": generation}
    return {"apiVersion": VERSION, "kind": "HTTPRoute", "metadata": metadata, "spec": {}}


def mesh(*names: str, accepted: bool = True, generation: int = 1) -> Mesh:
    condition = Condition("Accepted", accepted, "Accepted" if accepted else "NoMatchingParent")
    return Mesh(
        routes=tuple(
            Route(Name("demo", name), "", (Parent(Name("demo", "web"), 80),), (), ())
            for name in names
        ),
        statuses=tuple(
            ObjectStatus(
                VERSION,
                "HTTPRoute",
                "demo",
                name,
                generation,
                parents=(ParentStatus(WEB, (condition,)),),
            )
            for name in names
        ),
    )


class Running:
    """Writers on one server, by the names of their replicas."""

    def __init__(self, server: ApiServer, stack: AsyncExitStack) -> None:
        self._server = server
        self._stack = stack
        self.refused: dict[str, list[tuple[NodeId, Quarantined]]] = {}

    async def writer(self, replica: str) -> Writer:
        source = Kubernetes(Client(Access(self._server.url)), "here")
        await source.read()
        refused = self.refused.setdefault(replica, [])
        made = Writer(source, lambda: refused, replica)
        task = asyncio.create_task(made.run())

        async def end() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            source.close()

        self._stack.push_async_callback(end)
        return made

    async def until(self, happened: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not happened():
                await asyncio.sleep(0.01)

    def conditions(self, name: str) -> dict[str, str]:
        status = self._server.objects["httproutes"][f"demo/{name}"].get("status", {})
        return {
            entry["type"]: entry["status"]
            for parent in status.get("parents", [])
            for entry in parent["conditions"]
        }


@pytest.fixture
async def running(server: ApiServer) -> AsyncIterator[Running]:
    async with AsyncExitStack() as stack:
        yield Running(server, stack)


GOOD = {"Accepted": "True", "Programmed": "True"}


async def test_a_status_is_written_once_and_again_when_it_changes(
    server: ApiServer, running: Running
) -> None:
    server.apply(route("a"), route("b"))
    writer = await running.writer("one")
    writer.want(mesh("a", "b"))
    await running.until(lambda: running.conditions("a") == running.conditions("b") == GOOD)
    writer.want(mesh("a", "b"))
    writer.want(mesh("a", "b", accepted=False))
    await running.until(lambda: running.conditions("b") == {"Accepted": "False"})
    await running.until(lambda: running.conditions("a") == {"Accepted": "False"})
    writer.want(mesh("a", "b", accepted=False))
    writer.want(mesh("b", accepted=False))
    await running.until(lambda: running.conditions("a") == {})
    assert [name for _, name, _ in server.written] == ["demo/a", "demo/b"] * 2 + ["demo/a"]


async def test_what_was_wiped_is_written_again(server: ApiServer, running: Running) -> None:
    server.apply(route("a"))
    (await running.writer("one")).want(mesh("a"))
    await running.until(lambda: running.conditions("a") == GOOD)
    server.patch_status("httproutes", "demo/a", {"status": {"parents": []}})
    await running.until(lambda: running.conditions("a") == GOOD)


async def test_a_newer_object_waits_for_its_own_judgement(
    server: ApiServer, running: Running
) -> None:
    server.apply(route("a", generation=2), route("b"))
    writer = await running.writer("one")
    writer.want(mesh("a", "b"))
    await running.until(lambda: running.conditions("b") == GOOD)
    assert running.conditions("a") == {}
    writer.want(mesh("a", generation=2))
    await running.until(lambda: running.conditions("a") == GOOD)


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.FORBIDDEN, Fault.SILENT])
async def test_a_server_in_trouble_is_asked_again(
    server: ApiServer, running: Running, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    server.apply(route("a"))
    server.fail("patch", "httproutes", fault, fault, fault)
    (await running.writer("one")).want(mesh("a"))
    await running.until(lambda: running.conditions("a") == GOOD)
    assert caplog.text.count("a status is not written: ") == 1


async def test_of_two_writers_at_once_one_writes(server: ApiServer, running: Running) -> None:
    names = [f"r{number}" for number in range(20)]
    server.apply(*map(route, names))
    writers = [await running.writer(name) for name in ("one", "two")]
    for writer in writers:
        writer.want(mesh(*names))
    await running.until(lambda: all(running.conditions(name) == GOOD for name in names))
    await asyncio.sleep(0.3)
    assert sorted(name for _, name, _ in server.written) == sorted(f"demo/{n}" for n in names)


async def test_a_write_of_somebody_else_in_between_is_not_lost(
    server: ApiServer, running: Running
) -> None:
    """The version that a write was made for is the one that it is for."""
    server.apply(route("a"))
    writer = await running.writer("one")
    theirs = {"parentRef": {"name": "g"}, "controllerName": "theirs", "conditions": []}
    stale = copy.deepcopy(server.objects["httproutes"]["demo/a"])
    server.patch_status("httproutes", "demo/a", {"status": {"parents": [theirs]}})
    writer.want(mesh("a"))
    await running.until(lambda: running.conditions("a") == GOOD)
    assert server.objects["httproutes"]["demo/a"]["status"]["parents"][0] == theirs
    answer = server.patch_status("httproutes", "demo/a", {**stale, "status": {}})
    assert answer[0] == 409


async def test_what_a_sidecar_refuses_is_told_by_its_server_alone(
    server: ApiServer, running: Running
) -> None:
    server.apply(route("a"), pod("one", "1"), pod("two", "2"))
    writers = [await running.writer(name) for name in ("one", "two")]
    for writer in writers:
        writer.want(mesh("a"))
    await running.until(lambda: running.conditions("a") == GOOD)
    node = NodeId("10.0.0.1", "client", "demo")
    words = "Unable to parse regex"
    running.refused["two"].append((node, Quarantined(ROUTE, "outbound|80|web.demo", "v", words)))
    await running.until(lambda: running.conditions("a")["Programmed"] == "False")
    status = server.objects["httproutes"]["demo/a"]["status"]
    (told,) = (c for c in status["parents"][0]["conditions"] if c["type"] == "Programmed")
    assert told["message"] == f"refused by client.demo: {words} (told by two)"
    # The other one lets it stand.
    writes = len(server.written)
    writers[0].want(mesh("a"))
    await asyncio.sleep(0.3)
    assert len(server.written) == writes
    running.refused["two"].clear()
    await running.until(lambda: running.conditions("a") == GOOD)
