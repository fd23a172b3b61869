"""What `redirector flows` tells of real connections, and who follows."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from itertools import chain
from pathlib import Path

import probes
import pytest
from sockets import pod_socket

from redirector import cli
from redirector.datapath.followers import Follower, Followers
from redirector.datapath.layout import MAX_FOLLOWERS, EventKind, EventRecord
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.errors import InputError
from redirector.flows.command import open_now
from redirector.flows.event import Clock, FlowEvent, What, from_event
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode, Steering
from redirector.options import parse

pytestmark = pytest.mark.root

SERVICE = ("10.96.1.1", 80)
SERVICE6 = ("fd96::1", 80)
#: Excluded by the steering of these tests' pods.
DIRECT_PORT, DIRECT_INBOUND = 8443, 9443
STEERING: Steering = parse(
    {"excludeOutboundPorts": str(DIRECT_PORT), "excludeInboundPorts": str(DIRECT_INBOUND)}
)


def listen(pod: LabPod, port: int, *, sidecar: bool = False, v6: bool = False) -> socket.socket:
    made = pod_socket(pod, sidecar=sidecar, family=socket.AF_INET6 if v6 else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("::" if v6 else "0.0.0.0", port))
    made.listen()
    return made


@pytest.fixture(params=[Accelerate.ON, Accelerate.OFF])
def pod(node: Node, enrollment: Enrollment, request: pytest.FixtureRequest) -> LabPod:
    made = node.pod("pod")
    enrollment.enroll("demo/pod", made.netns, made.cgroup, Mode.EBPF, request.param, STEERING)
    return made


@pytest.fixture
def plain(node: Node, enrollment: Enrollment) -> LabPod:
    """Not accelerated."""
    made = node.pod("pod")
    enrollment.enroll("demo/pod", made.netns, made.cgroup, Mode.EBPF, Accelerate.OFF, STEERING)
    return made


@contextmanager
def following(datapath: Datapath) -> Iterator[Follower]:
    followers = datapath.followers()
    assert followers is not None
    with followers.follow() as follower:
        yield follower


def told(events: list[EventRecord], enrollment: Enrollment) -> list[FlowEvent]:
    clock = Clock(time.time_ns(), time.monotonic_ns())
    names = {pod.netns_cookie: pod.name for pod in enrollment.pods()}
    return [from_event(event, clock, names) for event in events]


def events_of(follower: Follower) -> list[EventRecord]:
    """Those that have come by now."""
    return list(chain.from_iterable(follower.read()))


def eventually(follower: Follower, count: int) -> list[EventRecord]:
    """What has been read once there is as much of it: a close is told by the last ACK."""
    found: list[EventRecord] = []
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        found += events_of(follower)
        time.sleep(0.01)
    return found


def converse(client: socket.socket, server: socket.socket) -> None:
    """100 bytes there, 250 back."""
    for sender, receiver, size in ((client, server, 100), (server, client, 250)):
        sender.sendall(b"x" * size)
        while size:
            size -= len(receiver.recv(size))


def exchange(pod: LabPod, address: tuple[str, int], listener: socket.socket) -> None:
    """A connection that opens, converses and closes, the client first."""
    client = pod_socket(pod)
    client.connect(address)
    server, _ = listener.accept()
    converse(client, server)
    client.close()
    server.close()


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("closes_first", ["client", "server"])
def test_a_steered_connection_opens_and_closes(
    pod: LabPod, enrollment: Enrollment, datapath: Datapath, v6: bool, closes_first: str
) -> None:
    accelerated = enrollment.get("demo/pod").accelerate is Accelerate.ON
    service = SERVICE6 if v6 else SERVICE
    with following(datapath) as follower, listen(pod, 15001, sidecar=True, v6=v6) as listener:
        client = pod_socket(pod, family=socket.AF_INET6 if v6 else socket.AF_INET)
        client.connect(service)
        server, _ = listener.accept()
        converse(client, server)
        source = client.getsockname()
        first, last = (client, server) if closes_first == "client" else (server, client)
        first.close()
        assert last.recv(1) == b""
        last.close()
        opened, closed = told(eventually(follower, 2), enrollment)
    assert (opened.what, closed.what) == (What.OPEN, What.CLOSE)
    assert opened.id == closed.id != 0
    for event in (opened, closed):
        assert event.pod == "demo/pod"
        assert (event.pid, event.comm) == (os.getpid(), Path("/proc/self/comm").read_text().strip())
        assert event.verdict == "outbound"
        assert event.rule == "outbound.included-cidr"
        assert event.reason is None
        host = f"[{service[0]}]" if v6 else service[0]
        assert event.destination == f"{host}:80"
        assert event.source.endswith(f":{source[1]}")
        assert event.accelerated == accelerated
    assert (opened.sent, opened.received) == (0, 0)
    assert (closed.sent, closed.received) == (100, 250)
    assert closed.short_circuited == (350 if accelerated else 0)
    assert opened.connect_seconds == closed.connect_seconds
    assert opened.connect_seconds
    assert closed.seconds
    assert closed.seconds > opened.connect_seconds


def test_a_direct_connection_is_told_with_the_rule_and_its_bytes(
    node: Node, pod: LabPod, enrollment: Enrollment, datapath: Datapath
) -> None:
    outside = node.pod("outside")
    with following(datapath) as follower, listen(outside, DIRECT_PORT) as listener:
        exchange(pod, (outside.ip, DIRECT_PORT), listener)
        opened, closed = told(eventually(follower, 2), enrollment)
    assert (opened.what, closed.what) == (What.OPEN, What.CLOSE)
    for event in (opened, closed):
        assert (event.verdict, event.rule) == ("direct", "outbound.excluded-port")
        assert event.destination == f"{outside.ip}:{DIRECT_PORT}"
        assert event.pid == os.getpid()
        assert not event.accelerated
    assert (closed.sent, closed.received, closed.short_circuited) == (100, 250, 0)


@pytest.mark.parametrize(
    ("port", "listens", "verdict", "rule"),
    [
        (8080, 15006, "inbound", "inbound.included-port"),
        (DIRECT_INBOUND, DIRECT_INBOUND, "direct", "inbound.excluded-port"),
    ],
)
def test_a_connection_from_outside_is_told_by_the_pod_it_came_to(
    node: Node,
    pod: LabPod,
    enrollment: Enrollment,
    datapath: Datapath,
    port: int,
    listens: int,
    verdict: str,
    rule: str,
) -> None:
    outside = node.pod("outside")
    with (
        following(datapath) as follower,
        listen(pod, listens, sidecar=verdict == "inbound") as listener,
    ):
        exchange(outside, (pod.ip, port), listener)
        opened, closed = told(eventually(follower, 2), enrollment)
    assert (opened.what, closed.what) == (What.OPEN, What.CLOSE)
    assert opened.id == closed.id != 0
    for event in (opened, closed):
        assert (event.pod, event.verdict, event.rule) == ("demo/pod", verdict, rule)
        assert event.destination == f"{pod.ip}:{port}"
        assert event.source.startswith(f"{outside.ip}:")
        assert event.pid is None
    assert (closed.sent, closed.received, closed.short_circuited) == (250, 100, 0)


def test_between_two_pods_of_a_node_each_tells_its_own_end(
    node: Node, pod: LabPod, enrollment: Enrollment, datapath: Datapath
) -> None:
    accelerate = enrollment.get("demo/pod").accelerate
    other = node.pod("other")
    enrollment.enroll("demo/other", other.netns, other.cgroup, Mode.EBPF, accelerate)
    with following(datapath) as follower, listen(other, 15006, sidecar=True) as listener:
        client = pod.call(_as_sidecar, (other.ip, 8080), sidecar=True)
        other_end, _ = listener.accept()
        other_end.close()
        events = told(eventually(follower, 4), enrollment)
    assert client == "closed"
    ends = {(event.pod, event.what): event for event in events}
    assert len(ends) == len(events) == 4
    assert len({event.id for event in events}) == (1 if accelerate is Accelerate.ON else 2)
    assert ends["demo/pod", What.CLOSE].rule == "outbound.proxy-uid"
    assert ends["demo/other", What.CLOSE].rule == "inbound.included-port"
    assert ends["demo/pod", What.CLOSE].sent == ends["demo/other", What.CLOSE].received == 7
    assert ends["demo/pod", What.CLOSE].received == ends["demo/other", What.CLOSE].sent == 0


def _as_sidecar(address: tuple[str, int]) -> str:
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(b"request")
        time.sleep(0.05)
    return "closed"


def test_a_connection_that_nobody_takes_has_failed(
    plain: LabPod, enrollment: Enrollment, datapath: Datapath
) -> None:
    with following(datapath) as follower:
        with pod_socket(plain) as client, pytest.raises(ConnectionRefusedError):
            client.connect(SERVICE)
        (failed,) = told(eventually(follower, 1), enrollment)
    assert (failed.what, failed.verdict, failed.destination) == (
        What.FAILED,
        "outbound",
        "10.96.1.1:80",
    )
    assert failed.pid == os.getpid()


def test_what_is_refused_says_why(
    node: Node, plain: LabPod, enrollment: Enrollment, datapath: Datapath
) -> None:
    outside = node.pod("outside")
    with following(datapath) as follower:
        call = probes.Call(ip_address(plain.ip), 8080)
        assert outside.call(probes.dial, [call]) == ["ECONNREFUSED"]
        by_hand = probes.Call(ip_address(plain.ip), 15001)
        assert plain.call(probes.dial, [by_hand]) == ["ECONNREFUSED"]
        events = told(eventually(follower, 2), enrollment)
        assert events_of(follower) == []
    refused = {event.reason: event for event in events if event.what is What.REFUSED}
    assert set(refused) == {"no-listener", "no-flow"}
    assert refused["no-listener"].destination == f"{plain.ip}:8080"
    assert refused["no-listener"].source.startswith(outside.ip)
    assert refused["no-flow"].destination == f"{plain.ip}:15001"
    assert refused["no-flow"].comm == Path("/proc/self/comm").read_text().strip()
    assert all(event.verdict == "refused" for event in refused.values())


def test_nobody_follows_and_nothing_is_kept(plain: LabPod, datapath: Datapath) -> None:
    calls = [probes.Call(ip_address(SERVICE[0]), SERVICE[1])]
    with following(datapath):
        pass
    with following(datapath) as follower:
        pass
    plain.call(probes.dial, calls)
    with following(datapath) as follower:
        assert events_of(follower) == []
        plain.call(probes.dial, calls)
        assert len(eventually(follower, 1)) == 1


def test_two_followers_see_everything(plain: LabPod, datapath: Datapath) -> None:
    calls = [probes.Call(ip_address(SERVICE[0]), SERVICE[1])] * 20
    with following(datapath) as one, following(datapath) as two:
        plain.call(probes.dial, calls)
        first, second = eventually(one, 20), eventually(two, 20)
    assert first == second
    assert {event.kind for event in first} == {EventKind.FAILED}


def test_slots_are_limited_and_come_back(plain: LabPod, datapath: Datapath) -> None:  # noqa: ARG001
    followers = datapath.followers()
    assert followers is not None
    with ExitStack() as stack:
        for _ in range(MAX_FOLLOWERS):
            stack.enter_context(followers.follow())
        assert followers.sweep() == MAX_FOLLOWERS
        with pytest.raises(InputError, match="follow the flows already"), followers.follow():
            pass
    assert followers.sweep() == 0


def test_a_follower_that_does_not_read_loses_events_and_is_told_how_many(
    plain: LabPod, datapath: Datapath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redirector.datapath.followers.RING_SIZE", 4096)
    calls = [probes.Call(ip_address(SERVICE[0]), SERVICE[1])] * 100
    followers = datapath.followers()
    assert followers is not None
    before = followers.lost()
    with following(datapath) as idle:
        monkeypatch.undo()
        with following(datapath) as busy:
            plain.call(probes.dial, calls)
            assert len(eventually(busy, 100)) == 100
            assert busy.lost() == 0
        kept, lost = len(events_of(idle)), idle.lost()
        assert kept
        assert lost == 100 - kept
        assert idle.lost() == 0
    assert followers.lost() - before == lost


# -- the command


@contextmanager
def command(
    enrollment: Enrollment, datapath: Datapath, *arguments: str
) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        cli.STATE_VARIABLE: str(enrollment._records.directory),
        cli.PINS_VARIABLE: str(datapath.root),
    }
    argv = [sys.executable, "-m", "redirector.cli", "flows", *arguments]
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def await_followers(followers: Followers, count: int) -> None:
    deadline = time.monotonic() + 20
    while followers.sweep() != count:
        assert time.monotonic() < deadline, f"{followers.sweep()} followers, wanted {count}"
        time.sleep(0.05)


def test_the_command_follows_pods_that_come_and_go(
    node: Node, plain: LabPod, enrollment: Enrollment, datapath: Datapath
) -> None:
    followers = datapath.followers()
    assert followers is not None
    calls = [probes.Call(ip_address(SERVICE[0]), SERVICE[1])]
    with command(enrollment, datapath, "--follow", "-o", "json") as process:
        await_followers(followers, 1)
        plain.call(probes.dial, calls)
        late = node.pod("late")
        enrollment.enroll("demo/late", late.netns, late.cgroup, Mode.EBPF)
        late.call(probes.dial, calls)
        enrollment.unenroll("demo/pod")
        plain.call(probes.dial, calls)
        late.call(probes.dial, calls)
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert [line["pod"] for line in lines] == ["demo/pod", "demo/late", "demo/late"]
    assert {line["event"] for line in lines} == {"failed"}
    assert (process.returncode, out, err) == (0, "", "")
    assert followers.sweep() == 0


def test_a_killed_follower_leaves_its_slot_to_the_next(
    plain: LabPod, enrollment: Enrollment, datapath: Datapath
) -> None:
    followers = datapath.followers()
    assert followers is not None
    with command(enrollment, datapath, "--follow") as process:
        await_followers(followers, 1)
        process.kill()
        process.wait(timeout=10)
        assert followers.sweep() == 0
    with following(datapath) as follower:
        plain.call(probes.dial, [probes.Call(ip_address(SERVICE[0]), SERVICE[1])])
        assert len(eventually(follower, 1)) == 1


def test_what_is_open_now(pod: LabPod, enrollment: Enrollment) -> None:
    accelerated = enrollment.get("demo/pod").accelerate is Accelerate.ON
    with listen(pod, 15001, sidecar=True) as listener:
        client = pod_socket(pod)
        client.connect(SERVICE)
        server, _ = listener.accept()
        converse(client, server)
        (found,) = open_now(enrollment)
        assert list(open_now(enrollment, "another")) == []
        client.close()
        server.close()
    assert (found.what, found.pod, found.rule) == (What.OPEN, "demo/pod", "outbound.included-cidr")
    assert (found.pid, found.destination) == (os.getpid(), "10.96.1.1:80")
    assert found.accelerated == accelerated
    assert (found.sent, found.received) == (100, 250)
    assert found.short_circuited == (350 if accelerated else 0)
    assert "10.96.1.1:80" in found.text()


def test_a_pod_in_iptables_mode_is_said_not_to_be_seen(
    node: Node, enrollment: Enrollment, datapath: Datapath
) -> None:
    other = node.pod("other")
    enrollment.enroll("demo/other", other.netns, other.cgroup, Mode.IPTABLES)
    with command(enrollment, datapath) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert err == (
        "redirector: not shown, in iptables mode, where 'redirector status' counts connections: "
        "demo/other\n"
    )
    with command(enrollment, datapath, "--follow", "--pod", "demo/other") as process:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "pod demo/other: is in iptables mode" in err
