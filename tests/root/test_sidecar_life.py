"""A sidecar that is not up, stands still, dies, comes back: alike in every way of steering.

What an application sees of it is what TCP and iptables show; nothing ever gets past the sidecar.
"""

import errno
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from multiprocessing.process import BaseProcess

import probes
import pytest
from mesh import WAYS, Way
from sockets import pod_socket
from waiting import eventually

from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode
from redirector.steering import Verdict

pytestmark = pytest.mark.root

PORT = 80
OUTBOUND, INBOUND = 15001, 15006
SIDECAR = [(Verdict.OUTBOUND, OUTBOUND), (Verdict.INBOUND, INBOUND)]
#: Long enough to see that nothing happens; a slow machine sees nothing the longer.
STILL_S = 0.3


@dataclass(frozen=True)
class World:
    """A pod to steer, and a peer that calls and is called. Both have an application."""

    pod: LabPod
    peer: LabPod
    way: Way
    enrollment: Enrollment

    def enroll(self) -> None:
        self.enrollment.enroll("pod", self.pod.netns, self.pod.cgroup, *self.way)

    def sidecar(self, *, share: bool = False) -> BaseProcess:
        return probes.start(self.pod, SIDECAR, sidecar=True, share=share)

    def arrivals(self) -> list[Verdict | str]:
        """Who accepts what the pod opens to the peer, then the peer to the pod: IPv4 and IPv6."""
        outcomes = []
        for caller, called in ((self.pod, self.peer), (self.peer, self.pod)):
            calls = [probes.Call(ip_address(text), PORT) for text in (called.ip, called.ip6)]
            outcomes += caller.call(probes.dial, calls)
        return [each.verdict if isinstance(each, probes.Arrival) else each for each in outcomes]

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """From the pod's application to the peer's, answered by the sidecar."""
        with pod_socket(self.pod) as client:
            client.connect((self.peer.ip, PORT))
            assert b'"outbound"' in client.recv(1024)
            yield client


STEERED: list[Verdict | str] = [Verdict.OUTBOUND] * 2 + [Verdict.INBOUND] * 2
REFUSED: list[Verdict | str] = ["ECONNREFUSED"] * 4


@pytest.fixture(params=list(WAYS))
def world(request: pytest.FixtureRequest, node: Node, enrollment: Enrollment) -> World:
    made = World(node.pod("pod"), node.pod("peer"), WAYS[request.param], enrollment)
    for pod in (made.pod, made.peer):
        probes.start(pod, [(Verdict.DIRECT, PORT)])
    return made


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def test_it_comes_dies_and_comes_back(world: World) -> None:
    """Without it connections are refused, though the applications listen."""
    world.enroll()
    for _ in range(2):
        assert world.arrivals() == REFUSED
        sidecar = world.sidecar()
        assert world.arrivals() == STEERED
        kill(sidecar)
    assert world.arrivals() == REFUSED


def test_one_that_is_older_than_the_enrolment(world: World) -> None:
    sidecar = world.sidecar()
    world.enroll()
    assert world.arrivals() == STEERED
    kill(sidecar)
    assert world.arrivals() == REFUSED


@pytest.mark.parametrize("enrolled", ["before", "between", "after"])
@pytest.mark.parametrize("leaves", [0, 1])
def test_two_at_once(world: World, enrolled: str, leaves: int) -> None:
    """A hot restart: the new one listens beside the old one, and either may be the one to go."""
    if enrolled == "before":
        world.enroll()
    both = [world.sidecar(share=True)]
    if enrolled == "between":
        world.enroll()
    both.append(world.sidecar(share=True))
    if enrolled == "after":
        world.enroll()
    assert world.arrivals() == STEERED
    kill(both.pop(leaves))
    assert world.arrivals() == STEERED
    kill(both.pop())
    assert world.arrivals() == REFUSED


def test_it_dies_with_an_answer_on_its_way(world: World) -> None:
    """What it has said is read to the end; then the connection ends."""
    world.enroll()
    sidecar = world.sidecar()
    with world.connection() as client:
        client.sendall(b"x" * 50_000)
        eventually("the echo", lambda: len(client.recv(65536, socket.MSG_PEEK)) == 50_000)
        kill(sidecar)
        got = b""
        while chunk := client.recv(65536):
            got += chunk
        assert got == b"x" * 50_000
        # To a socket that is no more: the first attempt brings the reset, the second is told of it.
        client.send(b"x")
        hung_up = select.poll()
        hung_up.register(client, 0)
        assert hung_up.poll(10_000)
        with pytest.raises(BrokenPipeError):
            client.send(b"x")


def test_it_dies_with_something_unread(world: World) -> None:
    world.enroll()
    sidecar = world.sidecar()
    with world.connection() as client:
        os.kill(sidecar.pid, signal.SIGSTOP)
        client.sendall(b"x" * 50_000)
        kill(sidecar)
        if world.way == (Mode.EBPF, Accelerate.ON):
            # docs/architecture.md, "What a socket in the sockhash cannot do".
            assert client.recv(1) == b""
        else:
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_it_stands_still_and_goes_on(world: World) -> None:
    world.enroll()
    sidecar = world.sidecar()
    with world.connection() as old, pod_socket(world.pod) as new:
        os.kill(sidecar.pid, signal.SIGSTOP)
        new.connect((world.peer.ip, PORT))
        for client in (old, new):
            client.sendall(b"question")
        assert select.select([old, new], [], [], STILL_S)[0] == []
        os.kill(sidecar.pid, signal.SIGCONT)
        assert b'"outbound"' in new.recv(1024, socket.MSG_PEEK)
        assert probes.echo(old, b"") == b""
        assert old.recv(8, socket.MSG_WAITALL) == b"question"


@pytest.mark.parametrize("inbound", [False, True])
def test_its_backlog_is_full(world: World, inbound: bool) -> None:
    """Who comes too many waits, and is served when there is room."""
    world.enroll()
    caller, called = (world.peer, world.pod) if inbound else (world.pod, world.peer)
    with ExitStack() as stack:
        listener = stack.enter_context(pod_socket(world.pod, sidecar=True))
        listener.bind(("0.0.0.0", INBOUND if inbound else OUTBOUND))
        listener.listen(2)
        clients = [stack.enter_context(pod_socket(caller)) for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            assert client.connect_ex((called.ip, PORT)) == errno.EINPROGRESS
        # The kernel lets one more in than was asked for (sk_acceptq_is_full).
        for client in clients[:3]:
            assert select.select([], [client], [], 10)[1]
        assert select.select([], [clients[3]], [], STILL_S)[1] == []
        for _ in range(4):
            stack.enter_context(listener.accept()[0])
        assert select.select([], [clients[3]], [], 10)[1]
        assert clients[3].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
