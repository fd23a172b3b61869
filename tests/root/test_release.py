"""A pod is released while connections are open: they keep their names until they end."""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import probes
import pytest
import traces
from sockets import pod_socket
from waiting import eventually

from redirector.datapath.layout import Counter
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode
from redirector.network import netns_cookie

pytestmark = pytest.mark.root

SERVICE = ("198.51.100.7", 8000)


@dataclass(frozen=True)
class World:
    """An enrolled pod with a steered connection that its sidecar has not accepted yet."""

    pod: LabPod
    netns: int
    enrollment: Enrollment
    datapath: Datapath
    listener: socket.socket
    client: socket.socket

    def enroll(self) -> None:
        place = (self.pod.netns, self.pod.cgroup)
        self.enrollment.enroll("pod", *place, Mode.EBPF, Accelerate.ON)

    def accept(self) -> socket.socket:
        """The connection as the sidecar gets it; it must be told the service's address."""
        accepted, _ = self.listener.accept()
        raw = accepted.getsockopt(socket.SOL_IP, probes.SO_ORIGINAL_DST, 16)
        port, address = struct.unpack_from("!H4s", raw, 2)
        assert (socket.inet_ntoa(address), port) == SERVICE
        return accepted

    def open(self) -> int:
        return len(self.datapath.maps.flows_of(self.netns))

    def is_swept(self) -> bool:
        self.enrollment.sweep()
        return not self.datapath.generation.released()

    def redirected(self) -> int:
        counters = self.datapath.maps.counters(self.netns, self.datapath.maps.moved())
        return counters.get(Counter.REDIRECTED_BYTES, 0)


@pytest.fixture
def world(node: Node, enrollment: Enrollment, datapath: Datapath) -> Iterator[World]:
    pod = node.pod("pod")
    with ExitStack() as stack:
        listener = stack.enter_context(pod_socket(pod, sidecar=True))
        listener.bind(("0.0.0.0", 15001))
        listener.listen()
        client = stack.enter_context(pod_socket(pod))
        made = World(pod, netns_cookie(pod.netns), enrollment, datapath, listener, client)
        made.enroll()
        client.connect(SERVICE)
        yield made


def to_iptables(enrollment: Enrollment) -> None:
    enrollment.change_mode("pod", Mode.IPTABLES)


def unenroll(enrollment: Enrollment) -> None:
    enrollment.unenroll("pod")


def decides(traced: str) -> bool:
    return traced.startswith(("CGROUP_INET4_CONNECT", "CGROUP_INET6_CONNECT", "SK_LOOKUP"))


def talk(one: socket.socket, other: socket.socket) -> None:
    for sender, reader in ((one, other), (other, one)):
        sender.sendall(b"x" * 100)
        assert reader.recv(100, socket.MSG_WAITALL) == b"x" * 100


@pytest.mark.parametrize("release", [to_iptables, unenroll])
def test_open_connections_keep_their_names(
    world: World, release: Callable[[Enrollment], None]
) -> None:
    """However long the sidecar stalls: nobody waits for it, and it is told all the same."""
    release(world.enrollment)
    assert not any(map(decides, traces.in_pod(world.pod)))
    assert world.datapath.maps.pod(world.netns) is None
    with world.accept() as accepted:
        assert world.client.getpeername() == SERVICE
        talk(world.client, accepted)
        counted = world.redirected()
        assert world.open() == 1
        assert not world.is_swept()
        world.client.close()
    eventually("the end of the connection", lambda: not world.open())
    # Each byte once: of the flow while it is open, of the pod's counters then.
    assert world.redirected() == counted == 200
    assert world.is_swept()
    assert world.redirected() == 0
    left = traces.in_pod(world.pod)
    assert not [trace for trace in left if "on the" in trace]
    assert (left == []) == (release is unenroll)


@pytest.mark.parametrize("release", [to_iptables, unenroll])
def test_a_pod_that_comes_back_finds_its_connections(
    world: World, release: Callable[[Enrollment], None]
) -> None:
    release(world.enrollment)
    if release is unenroll:
        world.enroll()
    else:
        world.enrollment.change_mode("pod", Mode.EBPF)
    assert world.enrollment.missing(world.enrollment.get("pod")) == ()
    # Its hooks stand once again, not twice.
    assert not world.datapath.generation.released()
    with pod_socket(world.pod) as another:
        another.connect(SERVICE)
        assert world.open() == 2
        for client in (world.client, another):
            with world.accept():
                assert client.getpeername() == SERVICE
    unenroll(world.enrollment)
    world.client.close()
    eventually("the end of all", world.is_swept)
    assert traces.in_pod(world.pod) == []


def test_a_cgroup_is_free_for_another_namespace(world: World, node: Node) -> None:
    """The programs would run twice for one connection: those of open connections give way."""
    unenroll(world.enrollment)
    other = node.pod("other")
    enroll = partial(world.enrollment.enroll, "other", other.netns, world.pod.cgroup)
    enroll(Mode.EBPF)
    assert not world.datapath.generation.released()
    assert world.open() == 0


def test_uninstall_waits_for_nobody(world: World) -> None:
    unenroll(world.enrollment)
    assert world.enrollment.steered() == 1
    assert world.enrollment.uninstall() == []
    assert traces.in_pod(world.pod) == []
    assert traces.in_files(world.datapath.root, world.enrollment._records.directory) == []
