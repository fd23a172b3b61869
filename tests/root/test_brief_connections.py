"""Where brief connections follow each other fast, the next ones are left out of the sockhash."""

import ctypes
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
from accelerated import OUTBOUND, SERVICE, counted

from redirector.datapath.layout import Counter
from redirector.datapath.pins import Datapath
from redirector.datapath.source import SIZES
from redirector.enrollment import Enrollment
from redirector.flows.event import Clock, from_event
from redirector.lab import LabPod, Node
from redirector.machine import ensure_bpffs
from redirector.model import Accelerate, Mode
from redirector.records import Records

pytestmark = pytest.mark.root

#: Each counts for a minute here, however slow the machine is: past 64 the next ones are brief.
SLOW = {**SIZES, "BRIEF_NS": 60 * 10**9}
STORM = 70
OTHER_SERVICE = (SERVICE[0], SERVICE[1] + 1)
PR_SET_NAME = 15


@dataclass(frozen=True)
class Stormed:
    """A pod that has had a storm of brief connections to SERVICE, and its datapath."""

    pod: LabPod
    datapath: Datapath

    def count(self, counter: Counter) -> int:
        return counted(self.datapath, self.pod)[counter]


@pytest.fixture(scope="module")
def slow() -> Iterator[Datapath]:
    """One for all of them: each test's pod has habits of its own."""
    made = Datapath(ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}", SLOW)
    yield made
    made.unload()


@pytest.fixture
def stormed(node: Node, slow: Datapath, tmp_path: Path) -> Iterator[Stormed]:
    pod = node.pod("pod")
    enrollment = Enrollment(Records(tmp_path), slow)
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, Accelerate.ON)
    try:
        pod.call(talk, SERVICE, STORM, 1)
        yield Stormed(pod, slow)
    finally:
        enrollment.unenroll("pod")


def talk(service: tuple[str, int], connections: int, requests: int, name: str = "") -> None:
    """Connections one after the other; requests and their one reply on each."""
    if name:
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", OUTBOUND))
        listener.listen()
        for _ in range(connections):
            client = socket.create_connection(service)
            server, _ = listener.accept()
            for _ in range(requests):
                client.sendall(b"request")
                assert server.recv(16) == b"request"
            server.sendall(b"reply")
            server.close()
            assert client.recv(16) == b"reply"
            assert client.recv(16) == b""
            client.close()


def test_the_next_go_by_tcp_and_are_counted(stormed: Stormed) -> None:
    accelerated = stormed.count(Counter.ACCELERATED) // 2
    brief = stormed.count(Counter.PASSED_BRIEF)
    assert accelerated + brief == STORM
    assert brief > 0
    stormed.pod.call(talk, SERVICE, 10, 1)
    assert stormed.count(Counter.ACCELERATED) == 2 * accelerated
    assert stormed.count(Counter.PASSED_BRIEF) == brief + 10
    assert stormed.count(Counter.STEERED_OUTBOUND) == STORM + 10


def test_events_say_why(stormed: Stormed) -> None:
    followers = stormed.datapath.followers()
    assert followers is not None
    with followers.follow() as follower:
        stormed.pod.call(talk, SERVICE, 1, 1)
        read = chain.from_iterable(follower.read())
        events = [from_event(event, Clock(0, 0), {}) for event in read]
    assert [(event.what, event.reason) for event in events] == [
        ("open", "brief"),
        ("close", "brief"),
    ]


def test_other_destinations_and_programs_are_judged_by_themselves(stormed: Stormed) -> None:
    before = stormed.count(Counter.ACCELERATED)
    stormed.pod.call(talk, OTHER_SERVICE, 1, 1)
    stormed.pod.call(talk, SERVICE, 1, 1, "another")
    assert stormed.count(Counter.ACCELERATED) == before + 4


def test_one_that_was_not_brief_ends_it(stormed: Stormed) -> None:
    before = stormed.count(Counter.ACCELERATED)
    stormed.pod.call(talk, SERVICE, 1, 2)
    assert stormed.count(Counter.ACCELERATED) == before
    stormed.pod.call(talk, SERVICE, 1, 1)
    assert stormed.count(Counter.ACCELERATED) == before + 2


def test_longer_ones_are_never_left_out(stormed: Stormed) -> None:
    before = stormed.count(Counter.ACCELERATED)
    stormed.pod.call(talk, OTHER_SERVICE, 2 * STORM, 2)
    assert stormed.count(Counter.ACCELERATED) == before + 4 * STORM
