"""Programs of others on the same pod: theirs keep working, ours too, whoever came first."""

import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import others
import probes
import pytest
from mesh import WAYS, Way
from others import Flag, Others, Seen
from sockets import pod_socket
from waiting import eventually

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.errors import DatapathError
from redirector.lab import LabPod, Node
from redirector.model import Mode
from redirector.network import netns_cookie
from redirector.steering import Verdict

pytestmark = pytest.mark.root

PORT = 80
SERVICE = "10.96.7.7"
DENIED = "10.96.8.8"
OUTBOUND, INBOUND = 15001, 15006
STREAM = 64 << 20
#: The way with all of our programs, and the one with none.
BOTH = ["ebpf-accelerated", "iptables"]


@pytest.fixture(scope="module")
def others_pins(pins: Path) -> Iterator[Path]:
    place = pins.with_name(f"{pins.name}-others")
    place.mkdir()
    others.load(place)
    yield place
    shutil.rmtree(place)


@dataclass(frozen=True)
class World:
    """A pod to steer, a peer, and somebody else's programs, not attached yet."""

    pod: LabPod
    peer: LabPod
    others: Others
    enrollment: Enrollment

    def enroll(self, way: Way) -> None:
        self.enrollment.enroll("pod", self.pod.netns, self.pod.cgroup, *way)

    def dial(self, ip: str, port: int = PORT) -> probes.Arrival | str:
        (outcome,) = self.pod.call(probes.dial, [probes.Call(ip_address(ip), port)])
        return outcome

    def inbound(self) -> probes.Arrival | str:
        (outcome,) = self.peer.call(probes.dial, [probes.Call(ip_address(self.pod.ip), PORT)])
        return outcome

    def ran(self, action: Callable[[], object]) -> set[Seen]:
        """Which of the others' programs ran meanwhile."""
        before = self.others.seen()
        action()
        after = self.others.seen()
        return {each for each in Seen if after[each] > before[each]}

    def is_steered(self) -> None:
        """Assert that both directions go to the sidecar, their original destination kept."""
        for arrival, verdict, ip in (
            (self.dial(self.peer.ip), Verdict.OUTBOUND, self.peer.ip),
            (self.inbound(), Verdict.INBOUND, self.pod.ip),
        ):
            assert isinstance(arrival, probes.Arrival), arrival
            assert (arrival.verdict, str(arrival.destination), arrival.port) == (verdict, ip, PORT)


@pytest.fixture
def world(node: Node, enrollment: Enrollment, others_pins: Path) -> World:
    made = World(node.pod("pod"), node.pod("peer"), Others(others_pins), enrollment)
    sidecar = [(Verdict.OUTBOUND, OUTBOUND), (Verdict.INBOUND, INBOUND)]
    probes.start(made.pod, sidecar, sidecar=True)
    for pod in (made.pod, made.peer):
        probes.start(pod, [(Verdict.DIRECT, PORT)])
    made.others.serve((SERVICE, PORT), (made.peer.ip, PORT), DENIED)
    return made


def at(pod: LabPod, where: str) -> Path:
    return {"parent": pod.cgroup.parent, "pod": pod.cgroup, "child": pod.app}[where]


def ask_option(pod: LabPod) -> None:
    """The option that only somebody else's program knows."""
    with pod_socket(pod) as asking:
        (value,) = pod.call(asking.getsockopt, socket.SOL_IP, 200, 1)
        assert value == 42


@pytest.mark.parametrize("where", ["parent", "pod", "child"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", BOTH)
def test_on_the_cgroup(world: World, way: str, where: str, first: bool) -> None:
    """Beside ours, and after we have gone."""
    cgroup = at(world.pod, where)

    def use() -> None:
        ask_option(world.pod)
        world.dial(world.peer.ip)

    theirs = {Seen.GETSOCKOPT, Seen.CONNECT, Seen.SOCKOPS}
    with ExitStack() as stack:
        if not first:
            world.enroll(WAYS[way])
        for name in others.ON_CGROUP:
            stack.enter_context(world.others.attached(name, cgroup, Flag.MULTI))
        if first:
            world.enroll(WAYS[way])
        world.is_steered()
        assert world.ran(use) >= theirs
        world.enrollment.unenroll("pod")
        assert world.ran(use) >= theirs


@pytest.mark.parametrize("flag", list(Flag))
def test_below_ours_by_any_flag(world: World, flag: Flag) -> None:
    """Whoever has a cgroup inside the pod may want it for himself: ours run all the same."""
    world.enroll(WAYS["ebpf-accelerated"])
    with ExitStack() as stack:
        for name in others.ON_CGROUP:
            stack.enter_context(world.others.attached(name, world.pod.app, flag))
        world.is_steered()
        assert world.ran(lambda: world.dial(world.peer.ip)) >= {Seen.CONNECT, Seen.SOCKOPS}


@pytest.mark.parametrize("where", ["parent", "pod"])
def test_one_that_we_would_switch_off(world: World, where: str) -> None:
    """The kernel runs a program that allows overriding only where nobody else has one below it."""
    cgroup = at(world.pod, where)
    with world.others.attached("connect4", cgroup, Flag.OVERRIDE):
        with pytest.raises(DatapathError, match=f"connect4 on {world.pod.cgroup}: .*{cgroup}"):
            world.enroll(WAYS["ebpf-accelerated"])
        assert world.enrollment.status() == []
        assert Seen.CONNECT in world.ran(lambda: world.dial(world.peer.ip))
        world.enroll(WAYS["iptables"])
        world.is_steered()
        assert Seen.CONNECT in world.ran(lambda: world.dial(world.peer.ip))


@pytest.mark.parametrize("where", ["parent", "child"])
@pytest.mark.parametrize("way", BOTH)
def test_a_load_balancer_at_the_socket(world: World, way: str, where: str) -> None:
    """connect() to a service that another program translates, as Cilium's does at the root."""
    world.enroll(WAYS[way])
    with world.others.attached("connect4", at(world.pod, where), Flag.MULTI):
        arrival = world.dial(SERVICE)
        assert isinstance(arrival, probes.Arrival), arrival
        assert arrival.verdict is Verdict.OUTBOUND
        # From the pod upward: who is above ours comes later, and finds what we have made of it.
        ours_first = where == "parent" and WAYS[way][0] is Mode.EBPF
        assert str(arrival.destination) == (SERVICE if ours_first else world.peer.ip)
        if where == "child":
            return
        # What the sidecar then asks for is theirs to translate and to refuse.
        calls = [probes.Call(ip_address(ip), PORT) for ip in (SERVICE, DENIED)]
        translated, refused = world.pod.call(probes.dial, calls, sidecar=True)
        assert translated.verdict is Verdict.DIRECT
        assert refused == "EPERM"


def test_a_refusal_of_theirs_leaves_nothing_of_ours(world: World, datapath: Datapath) -> None:
    world.enroll(WAYS["ebpf-accelerated"])
    # Refuses what comes from us, too: the address that we aim at, for who has a port of its own.
    world.others.serve((SERVICE, PORT), (world.peer.ip, PORT), world.pod.ip)
    with pod_socket(world.pod) as client:
        with (
            world.others.attached("connect4", world.pod.cgroup.parent, Flag.MULTI),
            pytest.raises(PermissionError),
        ):
            client.bind(("0.0.0.0", 0))
            client.connect((world.peer.ip, PORT + 1))
        assert datapath.maps.flows_of(netns_cookie(world.pod.netns)) == []
        client.connect((world.peer.ip, PORT))
        assert client.getpeername() == (world.peer.ip, PORT)
        cookie = netns_cookie(world.pod.netns)
        assert [str(f.flow.original.ip.ip()) for f in datapath.maps.flows_of(cookie)] == [
            world.peer.ip
        ]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", BOTH)
def test_on_the_namespace(world: World, way: str, first: bool) -> None:
    with ExitStack() as stack:
        if not first:
            world.enroll(WAYS[way])
        stack.enter_context(world.others.linked("sk_lookup", world.pod.netns))
        if first:
            world.enroll(WAYS[way])
        world.is_steered()
        assert Seen.LOOKUP in world.ran(world.inbound)
        world.enrollment.unenroll("pod")
        assert Seen.LOOKUP in world.ran(world.inbound)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", BOTH)
def test_on_the_interface(world: World, way: str, first: bool) -> None:
    """tc's clsact, as a CNI has it."""

    def attach() -> None:
        world.pod.run(["tc", "qdisc", "add", "dev", "eth0", "clsact"], check=True)
        for side in ("ingress", "egress"):
            argv = ["tc", "filter", "add", "dev", "eth0", side, "bpf", "da", "pinned"]
            world.pod.run([*argv, world.others.pins / side], check=True)

    if first:
        attach()
    world.enroll(WAYS[way])
    if not first:
        attach()
    world.is_steered()
    both = {Seen.INGRESS, Seen.EGRESS}
    assert world.ran(world.inbound) >= both
    world.enrollment.unenroll("pod")
    assert world.ran(world.inbound) >= both


def test_a_close_that_they_kept_from_us_is_found(world: World, datapath: Datapath) -> None:
    """A program that sets a socket's callback flags anew takes ours away."""
    pod = world.pod
    world.enroll(WAYS["ebpf-accelerated"])
    netns = netns_cookie(pod.netns)
    forget = partial(world.enrollment.forget_closed, settled_ns=0)
    with world.others.attached("deaf_sockops", pod.cgroup, Flag.MULTI):
        with pod_socket(pod) as open_one:
            open_one.connect((world.peer.ip, PORT))
            world.dial(world.peer.ip)
            assert len(datapath.maps.flows_of(netns)) == 2
            assert world.enrollment.forget_closed() == 0, "both are young"
            eventually("the flow that was closed", lambda: forget() == 1)
            assert len(datapath.maps.flows_of(netns)) == 1
        eventually("the other one, once its peer has closed, too", lambda: forget() == 1)
    assert not datapath.maps.flows_of(netns)


def test_a_callback_of_theirs_outlives_our_use_of_it(world: World) -> None:
    """Both ask for the round-trip callback; we need it no more once a stream has left us."""
    pod = world.peer
    world.enrollment.enroll("peer", pod.netns, pod.cgroup, *WAYS["ebpf-accelerated"])
    with (
        world.others.attached("sockops", pod.app, Flag.MULTI),
        pod_socket(pod, sidecar=True) as listener,
        pod_socket(pod) as client,
        ThreadPoolExecutor(1) as reader,
    ):
        listener.bind(("0.0.0.0", OUTBOUND))
        listener.listen()
        client.connect((SERVICE, PORT))
        server, _ = listener.accept()
        with server:
            server.settimeout(10)
            arrived = reader.submit(_read, server, STREAM)
            client.sendall(bytes(STREAM))
            arrived.result()
            # The client has waited for room in its buffer: it has left the sockhash.

            def go_on() -> None:
                client.sendall(bytes(STREAM))

            arrived = reader.submit(_read, server, STREAM)
            assert Seen.RTT in world.ran(go_on)
            arrived.result()


def _read(end: socket.socket, size: int) -> None:
    while size > 0:
        chunk = end.recv(1 << 20)
        assert chunk
        size -= len(chunk)
