"""A node for tests that need the real kernel. Without root they fail; they do not skip."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import Node
from redirector.machine import ensure_bpffs
from redirector.model import Mode
from redirector.modes.base import ModeDriver
from redirector.modes.ebpf import EbpfMode
from redirector.modes.iptables import IptablesMode
from redirector.records import Records


@pytest.fixture(scope="session")
def pins() -> Iterator[Path]:
    """A place of this run's own in bpffs: the programs are loaded once for all tests."""
    if os.geteuid() != 0:
        pytest.fail("this test loads programs into the kernel: run it as root")
    root = ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}"
    yield root
    Datapath(root).unload()


@pytest.fixture
def node() -> Iterator[Node]:
    if os.geteuid() != 0:
        pytest.fail("this test makes namespaces and cgroups: run it as root")
    with Node(prefix="rdrtest") as made:
        yield made


@pytest.fixture
def datapath(pins: Path) -> Datapath:
    return Datapath(pins)


@pytest.fixture(params=list(Mode))
def driver(request: pytest.FixtureRequest, datapath: Datapath) -> ModeDriver:
    """Each mode that must follow the decision rules."""
    return EbpfMode(datapath) if request.param is Mode.EBPF else IptablesMode()


@pytest.fixture
def enrollment(datapath: Datapath, node: Node, tmp_path: Path) -> Iterator[Enrollment]:  # noqa: ARG001
    """Enrols pods of the test's node; takes them off before the node goes."""
    records = Records(tmp_path / "pods")
    made = Enrollment(records, datapath)
    yield made
    for pod in records.all():
        made.unenroll(pod.name)
