"""The demo's last step must see what is left: of each kind, something is left here on purpose."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from redirector.datapath import libbpf
from redirector.datapath.libbpf import Kind
from redirector.demo import leftovers
from redirector.demo.leftovers import Inventory, take_inventory
from redirector.demo.world import World
from redirector.lab.node import NETNS_DIRECTORY
from redirector.model import Mode


@pytest.fixture
def world() -> Iterator[World]:
    with World() as made:
        made.make_pods()
        yield made


@pytest.fixture
def inventory(world: World) -> Inventory:
    pod = world.pods["client"]
    world.enrollment.enroll("client", pod.netns, pod.cgroup, Mode.EBPF)
    pod.popen(["sleep", "1000"])
    return take_inventory(world)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left on purpose will not go."""
    monkeypatch.setattr(leftovers, "_PATIENCE", 0.1)


@pytest.mark.usefixtures("impatient")
def test_what_stands_is_seen(inventory: Inventory) -> None:
    for kind in Kind:
        there = {found.id for found in inventory.of(kind)}
        assert there
        assert set(leftovers.objects_left(inventory, kind)) == there
    (sleeper,) = leftovers.processes_left(inventory)
    assert leftovers.namespaces_left(inventory) == [
        *map(str, inventory.namespaces),
        f"held by process {sleeper}",
    ]
    paths = (inventory.pins, inventory.files, *inventory.cgroups)
    assert leftovers.paths_left(*paths) == list(map(str, paths))


def test_what_is_gone_is_not_seen(world: World, inventory: Inventory) -> None:
    world.close()
    for kind in Kind:
        assert leftovers.objects_left(inventory, kind) == []
    assert leftovers.namespaces_left(inventory) == []
    assert leftovers.processes_left(inventory) == []
    assert leftovers.paths_left(inventory.pins, inventory.files, *inventory.cgroups) == []


def test_a_program_that_somebody_holds_is_seen_without_its_pin(
    world: World, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = libbpf.obj_get(world.datapath.programs / "connect4")
    try:
        world.close()
        monkeypatch.setattr(leftovers, "_PATIENCE", 0.1)
        assert leftovers.objects_left(inventory, Kind.PROGRAM) == [libbpf.object_id(held).id]
    finally:
        os.close(held)


@pytest.mark.usefixtures("impatient")
def test_a_namespace_without_a_name_is_seen_while_a_process_is_in_it(world: World) -> None:
    # In its namespace, but not in the pod's cgroup: closing the world does not reach it.
    path = NETNS_DIRECTORY / world.node.name
    inventory = take_inventory(world)
    with subprocess.Popen(["nsenter", f"--net={path}", "sleep", "1000"]) as holder:
        try:
            while os.stat(f"/proc/{holder.pid}/ns/net").st_ino != path.stat().st_ino:
                assert holder.poll() is None
            world.close()
            assert leftovers.namespaces_left(inventory) == [f"held by process {holder.pid}"]
        finally:
            holder.kill()
