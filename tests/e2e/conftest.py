"""What the end-to-end tests run in: pods made by hand, and a folder that sidecars can read."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import Sidecar, XdsServer

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import Node
from redirector.machine import ensure_bpffs
from redirector.records import Records

DEMO = Path(__file__).parents[2] / "manifests" / "demo"


@pytest.fixture
def node() -> Iterator[Node]:
    if os.geteuid() != 0:
        pytest.fail("this test makes namespaces and cgroups: run it as root")
    with Node(prefix="rdrtest") as made:
        yield made


@pytest.fixture(scope="session")
def datapath() -> Iterator[Datapath]:
    """Programs of this run's own in bpffs, loaded once."""
    made = Datapath(ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}")
    yield made
    made.unload()


@pytest.fixture
def enrollment(datapath: Datapath, node: Node, tmp_path: Path) -> Iterator[Enrollment]:  # noqa: ARG001
    """Enrols pods of the test's node; takes them off before the node goes."""
    records = Records(tmp_path / "pods")
    made = Enrollment(records, datapath)
    yield made
    for pod in records.all():
        made.unenroll(pod.name)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that uid 1337 may enter, which pytest's own tmp_path is not."""
    path = Path(tempfile.mkdtemp(prefix="rdrtest-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def manifests(place: Path) -> Path:
    """A copy of the demo's manifests to edit."""
    return Path(shutil.copytree(DEMO, place / "manifests"))


@pytest.fixture
def serve(place: Path, manifests: Path) -> Iterator[Callable[[], XdsServer]]:
    """Starts `xds-server` on the manifests; stopped after the test."""
    running: list[XdsServer] = []

    def start() -> XdsServer:
        running.append(XdsServer(place, manifests))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def sidecar(node: Node, place: Path) -> Callable[[str, str, str], Sidecar]:
    """Starts an Envoy in a pod of its own: name of the demo's pod, its IP, the xDS address."""

    def start(name: str, ip: str, xds: str) -> Sidecar:
        return Sidecar(node.pod(name, ip), place, name, "demo", xds)

    return start
