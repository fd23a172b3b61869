"""Two pods with sidecars and, one after the other, the ways that traffic can take between them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import open_folder
from mesh import WAYS, Mesh
from programs import Route
from sidecars import Passthrough, start_sidecar

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import Node
from redirector.records import Records


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    with open_folder() as path:
        yield path


@pytest.fixture(scope="module")
def pods(pins: Path, folder: Path) -> Iterator[Mesh]:
    """A client and a server, not enrolled; servers that are started here outlive a way."""
    if os.geteuid() != 0:
        pytest.fail("this test makes namespaces and cgroups: run it as root")
    datapath = Datapath(pins)
    with Node(prefix="rdrtest") as node:
        enrollment = Enrollment(Records(folder / "records"), datapath)
        yield Mesh(node.pod("client"), node.pod("server"), enrollment, datapath)


@pytest.fixture(scope="module")
def sidecars(pods: Mesh, folder: Path) -> tuple[Passthrough, Passthrough]:
    return start_sidecar(pods.client, folder), start_sidecar(pods.server, folder)


@pytest.fixture(scope="module", params=list(WAYS))
def route(
    request: pytest.FixtureRequest,
    pods: Mesh,
    sidecars: tuple[Passthrough, Passthrough],
    folder: Path,
) -> Iterator[Route]:
    """Each way in its turn; the same sidecars and servers serve all."""
    way = WAYS[request.param]
    pods.enroll(way)
    yield Route(pods, way, sidecars, folder)
    pods.unenroll()
