"""The modes that root tests run in, the pod that most of them need, a node with an agent."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import Ground, ground
from xtables import FLAVOURS, PROGRAMS

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode
from redirector.modes.base import ModeDriver
from redirector.modes.ebpf import EbpfMode
from redirector.modes.iptables.driver import IptablesMode
from redirector.records import Records


@pytest.fixture
def field(
    node: Node, enrollment: Enrollment, pins: Path, datapath: Datapath, tmp_path: Path
) -> Iterator[Ground]:
    """A cluster of one node for an agent; `enrollment` takes off what is left enrolled."""
    datapath.ensure()
    assert enrollment.pods() == []
    with ground(node, Records(tmp_path / "pods"), pins, tmp_path / "log") as made:
        yield made


@pytest.fixture(params=list(Mode))
def driver(request: pytest.FixtureRequest, datapath: Datapath) -> ModeDriver:
    """Each mode that must follow the decision rules."""
    return EbpfMode(datapath) if request.param is Mode.EBPF else IptablesMode()


@pytest.fixture(params=FLAVOURS)
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of PATH where iptables is of one flavour."""
    program = shutil.which(FLAVOURS[request.param], path="/usr/sbin:/sbin")
    assert program, f"{FLAVOURS[request.param]} is not installed: apt-get install iptables"
    for name in PROGRAMS:
        (tmp_path / name).symlink_to(program)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


@pytest.fixture
def pod(node: Node, enrollment: Enrollment) -> LabPod:
    """A pod whose connections are short-circuited, whatever the kernel is wrong about."""
    made = node.pod("pod")
    enrollment.enroll("pod", made.netns, made.cgroup, Mode.EBPF, Accelerate.ON)
    return made
