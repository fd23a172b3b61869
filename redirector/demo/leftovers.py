"""What the demo has put on this machine, by the kernel's own names, and what of it is left.

Ids, cookies and start times are never used twice, so a check is about the demo's own things also
when another demo runs beside it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from redirector import network
from redirector.datapath import libbpf
from redirector.datapath.libbpf import Kind, ObjectId
from redirector.demo.orphans import Process, running
from redirector.demo.world import World
from redirector.errors import RedirectorError
from redirector.lab.node import NETNS_DIRECTORY
from redirector.machine import cgroup2_mount
from redirector.processes import processes

T = TypeVar("T")

#: The kernel frees maps and programs some time after their last user is gone (RCU), seconds.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Inventory:
    """Everything that has to be gone in the end."""

    objects: frozenset[ObjectId]
    namespaces: tuple[Path, ...]
    cookies: frozenset[int]
    cgroups: tuple[Path, ...]
    processes: frozenset[Process]
    pins: Path
    files: Path

    def of(self, kind: Kind) -> frozenset[ObjectId]:
        """The kernel objects of one kind."""
        return frozenset(found for found in self.objects if found.kind is kind)


def take_inventory(world: World) -> Inventory:
    """What the world consists of now, while it stands."""
    pods = world.pods.values()
    cgroup = cgroup2_mount() / world.node.name
    namespaces = (*(pod.netns for pod in pods), NETNS_DIRECTORY / world.node.name)
    children = [child.process.pid for child in world.children.values()]
    alive = (running(pid) for pid in {*processes(cgroup), *children})
    return Inventory(
        objects=frozenset(_pinned(world.datapath.root)),
        namespaces=namespaces,
        cookies=frozenset(network.netns_cookie(path) for path in namespaces),
        cgroups=(cgroup, *(path for path in cgroup.rglob("*") if path.is_dir())),
        processes=frozenset(process for process in alive if process is not None),
        pins=world.datapath.root,
        files=world.files,
    )


def _pinned(root: Path) -> set[ObjectId]:
    found = set()
    for path in root.rglob("*"):
        if not path.is_dir():
            with libbpf.opened(path) as fd:
                found.add(libbpf.object_id(fd))
    return found


def objects_left(inventory: Inventory, kind: Kind) -> list[int]:
    """Ids of programs, maps or links that the kernel still has, after it had time to free them."""
    return _settled(lambda: [o.id for o in inventory.of(kind) if libbpf.is_alive(o)])


def namespaces_left(inventory: Inventory) -> list[str]:
    """Names of namespaces, and processes that hold one of them without a name."""

    def look() -> list[str]:
        names = [str(path) for path in inventory.namespaces if os.path.lexists(path)]
        return names + [f"held by process {pid}" for pid in _holders(inventory.cookies)]

    return _settled(look)


def _holders(cookies: frozenset[int]) -> list[int]:
    own = os.stat("/proc/self/ns/net").st_ino
    found: list[int] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        netns = process / "ns/net"
        try:
            if netns.stat().st_ino != own and network.netns_cookie(netns) in cookies:
                found.append(int(process.name))
        except (OSError, RedirectorError):
            continue  # ended meanwhile
    return found


def processes_left(inventory: Inventory) -> list[int]:
    """Processes that run, or that nobody has waited for."""
    return _settled(
        lambda: [process.pid for process in inventory.processes if running(process.pid) == process]
    )


def paths_left(*paths: Path) -> list[str]:
    """Those of the paths that exist."""
    return [str(path) for path in paths if os.path.lexists(path)]


def _settled(look: Callable[[], list[T]]) -> list[T]:
    deadline = time.monotonic() + _PATIENCE
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
