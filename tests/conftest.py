"""Options and fixtures for every test. Without root, what needs it fails; it does not skip."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import Node
from redirector.machine import ensure_bpffs
from redirector.records import Records


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden files from what the code gives now, and remove orphans",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


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
    """A node for tests that need the real kernel."""
    if os.geteuid() != 0:
        pytest.fail("this test makes namespaces and cgroups: run it as root")
    with Node(prefix="rdrtest") as made:
        yield made


@pytest.fixture
def datapath(pins: Path) -> Datapath:
    return Datapath(pins)


@pytest.fixture
def enrollment(
    datapath: Datapath,
    node: Node,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Enrollment]:
    """Enrols pods of the test's node; takes them off before the node goes.

    Most listeners that stand for a sidecar never ask for an original destination.
    """
    monkeypatch.setattr("redirector.modes.ebpf.DRAIN_SECONDS", 1.5)
    records = Records(tmp_path / "pods")
    made = Enrollment(records, datapath)
    yield made
    for pod in records.all():
        made.unenroll(pod.name)
