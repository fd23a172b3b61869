"""Ingesting again costs what has changed, and finds what ingesting anew would find."""

from dataclasses import fields
from pathlib import Path

import pytest
from xds_server.bench.objects import Size, World
from xds_server.ingest import Ingester
from xds_server.ir import Mesh
from xds_server.sources.files import parse
from xds_server.sources.objects import KubeObject

GOLDEN = sorted(Path(__file__).parents[2].glob("golden/xds/*.in.yaml"))


def objects(path: Path) -> list[KubeObject]:
    return parse(path.name, path.read_text())[0]


def same(one: Mesh, other: Mesh) -> bool:
    return all(getattr(one, f.name) == getattr(other, f.name) for f in fields(Mesh))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_the_same_objects_again_are_the_same_mesh_with_the_same_problems(path: Path) -> None:
    ingester, found = Ingester(), objects(path)
    mesh, problems = ingester.ingest(found)
    for _ in range(3):
        again, still = ingester.ingest(found)
        assert same(mesh, again)
        assert still == problems


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_objects_that_come_and_go_leave_nothing_behind(path: Path) -> None:
    ingester, found = Ingester(), objects(path)
    ingester.ingest(found)
    for number in range(0, len(found), len(found) // 4 + 1):
        fewer = found[:number] + found[number + 1 :]
        mesh, problems = ingester.ingest(fewer)
        wanted, expected = Ingester().ingest(fewer)
        # What is bad now and was good before stays in force: that is its own matter.
        assert mesh.kept or (same(mesh, wanted) and problems == expected)


def test_one_changed_object_is_read_and_no_other() -> None:
    world = World(Size(50, 20, 30))
    ingester = Ingester()
    ingester.ingest(world.objects())
    made = ingester.made
    assert (made["read_pod"], made["read_service"], made["read_slice"]) == (50, 20, 20)
    world.move_endpoint()
    ingester.ingest(world.objects())
    work = {name for name in ingester.made if not name.startswith("_")}
    assert work == {"read_slice", "build_service"}
    assert (ingester.made["read_slice"], ingester.made["build_service"]) == (1, 1)
    world.edit_policy()
    ingester.ingest(world.objects())
    work = {name for name in ingester.made if not name.startswith("_")}
    assert work == {"read", "services_aimed_at"}
