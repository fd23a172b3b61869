"""The server that is measured, in a process and on a CPU of its own."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from xds_server.bench.objects import Size, World, node_id
from xds_server.garbage import postponed, settle
from xds_server.generation import Generation
from xds_server.ingest import Ingester
from xds_server.ir import NodeId
from xds_server.lineage import Lineage
from xds_server.push import Push
from xds_server.server import Server

#: A change that was not answered by all in this time is told as it stands.
_PATIENCE_S = 120.0


class Command(StrEnum):
    """What the server is asked over the pipe; it answers each with one value."""

    MOVE_ENDPOINT = "an endpoint moves"
    EDIT_POLICY = "a policy is edited"
    MEMORY = "memory"


@dataclass(frozen=True)
class Cold:
    """From objects to the first sidecar's full configuration: seconds, and CPU seconds."""

    seconds: float
    cpu: float


@dataclass(frozen=True)
class Change:
    """What one change cost. `at` is when it was made (CLOCK_MONOTONIC); `cpu` counts all threads of
    the process until the last answer was booked; `encodings` are the resources serialized."""

    at: float
    seconds: float
    cpu: float
    encodings: int
    translated: int
    changed: int
    reached: int
    unanswered: int


def run(control: Connection, address: str, size: Size, cpu: int) -> None:
    """The process: answers commands until the pipe closes."""
    os.sched_setaffinity(0, {cpu})
    asyncio.run(_Served(control, size).serve(address))


class _Served:
    def __init__(self, control: Connection, size: Size) -> None:
        self._control = control
        self._world = World(size)
        self._objects = self._world.objects()
        self._ingester = Ingester()
        self._lineage = Lineage()
        self._pushes: asyncio.Queue[Push] = asyncio.Queue()

    async def serve(self, address: str) -> None:
        began, spent = time.perf_counter(), time.process_time()
        with postponed():
            generation = self._generation()
        settle()
        generation.snapshot(NodeId.parse(node_id(0)))
        cold = Cold(time.perf_counter() - began, time.process_time() - spent)
        server = Server(generation, report=self._pushes.put_nowait, report_after=_PATIENCE_S)
        server.listen(address)
        await server.start()
        self._control.send(cold)
        async for command in commands(self._control):
            self._control.send(await self._answer(server, command))
        await server.stop(0)

    async def _answer(self, server: Server, command: Command) -> Change | int:
        if command is Command.MEMORY:
            return resident(os.getpid())
        if command is Command.EDIT_POLICY:
            self._world.edit_policy()
        else:
            self._world.move_endpoint()
        self._objects = self._world.objects()
        at, spent = time.monotonic(), time.process_time()
        generation = self._generation()
        await server.publish(generation, command.value, time.time())
        push = await self._pushes.get()
        return Change(
            at,
            time.monotonic() - at,
            time.process_time() - spent,
            generation.encodings,
            self._lineage.translated,
            len(push.changed),
            len(push.reached),
            len(push.waiting),
        )

    def _generation(self) -> Generation:
        mesh, problems = self._ingester.ingest(self._objects)
        assert not problems, problems[0]
        return self._lineage.next(mesh)


async def commands(control: Connection) -> AsyncIterator[Any]:
    """What comes through the pipe until it closes."""
    found: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def take() -> None:
        try:
            found.put_nowait(control.recv())
        except EOFError:
            loop.remove_reader(control.fileno())
            found.put_nowait(None)

    loop.add_reader(control.fileno(), take)
    while (command := await found.get()) is not None:
        yield command


def resident(process: int) -> int:
    """Resident memory, bytes (proc(5), statm)."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
