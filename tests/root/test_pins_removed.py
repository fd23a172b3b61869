"""Pins that somebody removes: the next command puts them back, and nothing that runs is lost."""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerated import Pair, pair, receive
from waiting import eventually

from redirector.datapath.layout import Counter, Room, Side
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.errors import DatapathError
from redirector.lab import LabPod, Node
from redirector.machine import ensure_bpffs
from redirector.model import Accelerate, Mode
from redirector.network import netns_cookie
from redirector.records import Records

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def scratch() -> Iterator[Datapath]:
    """Programs of this module's own: others must not miss what is removed here."""
    datapath = Datapath(ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}")
    yield datapath
    datapath.unload()


@pytest.fixture
def pods(scratch: Datapath, tmp_path: Path) -> Iterator[Enrollment]:
    made = Enrollment(Records(tmp_path / "pods"), scratch)
    yield made
    for pod in made.pods():
        made.unenroll(pod.name)


@pytest.fixture
def pod(node: Node, pods: Enrollment) -> LabPod:
    made = node.pod("pod")
    pods.enroll("pod", made.netns, made.cgroup, Mode.EBPF, Accelerate.ON)
    return made


def remove(datapath: Datapath, pin: str) -> None:
    path = datapath.generation.directory / pin.format(build=datapath.programs.name)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def ask(ends: Pair) -> None:
    ends.client.sendall(b"request")
    assert receive(ends.server, 7) == b"request"
    ends.server.sendall(b"reply")
    assert receive(ends.client, 5) == b"reply"


@pytest.mark.parametrize(
    ("pin", "told"),
    [
        ("maps/flows", "maps/flows is gone; put it back: redirector takeover"),
        ("maps/about", "maps/about is gone; put it back: redirector takeover"),
        ("maps", ""),
        ("programs/{build}/connect4", ""),
        ("programs", ""),
    ],
)
def test_it_is_put_back_under_an_open_connection(
    scratch: Datapath, pods: Enrollment, pod: LabPod, pin: str, told: str
) -> None:
    cookie = netns_cookie(pod.netns)
    with pair(pod) as ends:
        ask(ends)
        remove(scratch, pin)
        if told:
            with pytest.raises(DatapathError, match=told):
                pods.node_status()
        else:
            (status,) = pods.node_status().pods
            assert status.missing == ("this version's programs",)
        assert pods.take_over()[1] == []
        (status,) = pods.node_status().pods
        assert status.missing == ()
        ask(ends)
        (flow,) = scratch.maps.flows_of(cookie)
        assert flow.flow.messages[Side.SERVER] == 2
    eventually("the end of its flow", lambda: not scratch.maps.flows_of(cookie))
    assert scratch.maps.room(Room.TAKEN) == 0
    with pair(pod) as ends:
        ask(ends)
    assert scratch.maps.counters(cookie)[Counter.ACCELERATED] == 4


@pytest.mark.parametrize("pin", ["maps/flows", "maps"])
def test_a_pod_is_taken_off_all_the_same(
    scratch: Datapath, pods: Enrollment, pod: LabPod, pin: str
) -> None:
    with pair(pod) as ends:
        ask(ends)
        remove(scratch, pin)
        pods.unenroll("pod")
        assert scratch.maps.fills()["flows"][0] == 0
        assert scratch.maps.room(Room.TAKEN) == 0
        ask(ends)
    assert pods.pods() == []
    assert netns_cookie(pod.netns) not in scratch.maps.shares()
