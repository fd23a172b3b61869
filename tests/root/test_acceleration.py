"""What the short-circuit promises: the bytes TCP would have delivered, in order, bounded."""

import array
import fcntl
import hashlib
import random
import secrets
import select
import socket
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sockets import connect_as, pod_socket

from redirector.datapath.layout import Counter, Defect
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.machine import ensure_bpffs
from redirector.model import Accelerate, Mode
from redirector.network import netns_cookie
from redirector.records import Records

pytestmark = pytest.mark.root

SERVICE = ("10.96.1.1", 80)
OUTBOUND = 15001
MIB = 1 << 20


class Pair:
    """Both ends of a steered connection, made in a pod's app and sidecar cgroups."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server


@contextmanager
def pair(
    pod: LabPod, *, defer_accept: bool = False, first: bytes = b"", source_port: int = 0
) -> Iterator[Pair]:
    """A connection from the app to a service, accepted by a listener in the sidecar's place.

    With `first`, the client has sent these bytes before the server accepts.
    """
    options = [(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)] if defer_accept else []
    listener = pod_socket(pod, sidecar=True, options=options)
    listener.bind(("0.0.0.0", OUTBOUND))
    listener.listen()
    client = pod_socket(pod)
    if source_port:
        client.bind((pod.ip, source_port))
    client.connect(SERVICE)
    for piece in (first[i : i + 4] for i in range(0, len(first), 4)):
        client.sendall(piece)
        time.sleep(0.02)
    server, _ = listener.accept()
    with client, server, listener:
        for end in (client, server):
            end.settimeout(10)
        yield Pair(client, server)


@pytest.fixture
def pod(node: Node, enrollment: Enrollment) -> LabPod:
    made = node.pod("pod")
    enrollment.enroll("pod", made.netns, made.cgroup, Mode.EBPF, Accelerate.ON)
    return made


def counted(datapath: Datapath, pod: LabPod) -> dict[Counter, int]:
    return datapath.maps.counters(netns_cookie(pod.netns))


def receive(end: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        chunk = end.recv(size - len(got))
        if not chunk:
            break
        got += chunk
    return bytes(got)


def readable(end: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(end.fileno(), termios.FIONREAD, count)
    return count[0]


def test_a_conversation_is_short_circuited(pod: LabPod, datapath: Datapath) -> None:
    with pair(pod) as ends:
        for n in range(100):
            ends.client.sendall(b"ping%04d" % n)
            assert receive(ends.server, 8) == b"ping%04d" % n
            ends.server.sendall(b"pong%04d" % n)
            assert receive(ends.client, 8) == b"pong%04d" % n
        counters = counted(datapath, pod)
    assert counters[Counter.STEERED_OUTBOUND] == 1
    assert counters[Counter.ACCELERATED] == 2
    assert counters[Counter.REDIRECTED_MESSAGES] == 200
    assert counters[Counter.REDIRECTED_BYTES] == 1600
    assert counters[Counter.PASSED_NO_PEER] == 0


def test_names_are_those_the_application_knows(pod: LabPod) -> None:
    with pair(pod) as ends:
        assert ends.client.getpeername() == SERVICE
        assert ends.client.getsockname()[0] == pod.ip
        assert ends.server.getpeername() == ends.client.getsockname()
        raw = ends.server.getsockopt(socket.SOL_IP, 80, 16)
        assert (socket.inet_ntoa(raw[4:8]), int.from_bytes(raw[2:4], "big")) == SERVICE


def test_without_acceleration_nothing_is_redirected(
    node: Node, enrollment: Enrollment, datapath: Datapath
) -> None:
    pod = node.pod("pod")
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, Accelerate.OFF)
    with pair(pod) as ends:
        ends.client.sendall(b"hello")
        assert receive(ends.server, 5) == b"hello"
        counters = counted(datapath, pod)
    assert counters[Counter.STEERED_OUTBOUND] == 1
    assert counters[Counter.ACCELERATED] == counters[Counter.REDIRECTED_MESSAGES] == 0


def test_order_with_deferred_and_late_accept(pod: LabPod) -> None:
    """A redirector that decides by message answers 222233331111 here."""
    with pair(pod, defer_accept=True, first=b"111122223333") as ends:
        ends.client.sendall(b"4444")
        assert receive(ends.server, 16) == b"1111222233334444"
        ends.server.sendall(b"answer")
        assert receive(ends.client, 6) == b"answer"


def test_order_with_late_accept(pod: LabPod) -> None:
    with pair(pod, first=b"111122223333") as ends:
        ends.client.sendall(b"4444")
        assert receive(ends.server, 16) == b"1111222233334444"


@pytest.mark.parametrize("size", [1, 4096, 300_000])
def test_half_close_with_data_queued(pod: LabPod, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    with pair(pod) as ends:
        ends.client.sendall(payload)
        ends.client.shutdown(socket.SHUT_WR)
        time.sleep(0.05)
        assert receive(ends.server, size + 1) == payload
        ends.server.sendall(payload)
        ends.server.shutdown(socket.SHUT_WR)
        assert receive(ends.client, size + 1) == payload


def test_close_with_data_queued(pod: LabPod) -> None:
    with pair(pod) as ends:
        ends.client.sendall(b"x" * 100_000)
        ends.client.close()
        time.sleep(0.05)
        assert len(receive(ends.server, 100_001)) == 100_000


def test_fionread_tells_redirected_bytes_or_the_kernel_is_known_not_to(
    pod: LabPod, datapath: Datapath
) -> None:
    right = Defect.FIONREAD not in datapath.defects()
    with pair(pod) as ends:
        assert readable(ends.server) == 0
        ends.client.sendall(b"x" * 1000)
        assert counted(datapath, pod)[Counter.REDIRECTED_BYTES] == 1000
        assert (readable(ends.server) == 1000) is right
        receive(ends.server, 400)
        assert (readable(ends.server) == 600) is right


def test_fionread_is_right_unless_somebody_insists(
    node: Node, enrollment: Enrollment, datapath: Datapath
) -> None:
    """`auto` short-circuits on exactly the kernels that do nothing wrong with it."""
    pod = node.pod("pod")
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, Accelerate.AUTO)
    (status,) = enrollment.status()
    with pair(pod) as ends:
        ends.client.sendall(b"x" * 1000)
        assert select.select([ends.server], [], [], 10)[0]
        assert readable(ends.server) == 1000
        redirected = counted(datapath, pod)[Counter.REDIRECTED_BYTES]
    assert redirected == (0 if status.defects else 1000)


def test_a_stalled_reader_holds_the_sender_back(pod: LabPod, datapath: Datapath) -> None:
    with pair(pod) as ends:
        ends.client.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while sent < 64 * MIB:
                sent += ends.client.send(b"x" * 65536)
        ends.client.settimeout(10)
        counters = counted(datapath, pod)
        assert counters[Counter.REDIRECTED_BYTES] <= MIB
        assert counters[Counter.PASSED_UNREAD] == 1
        assert len(receive(ends.server, sent)) == sent


def test_a_reply_gives_no_budget_for_bytes_left_unread(pod: LabPod, datapath: Datapath) -> None:
    """The server talks all the time and never reads: what the client may pile up stays bounded."""
    with pair(pod) as ends:
        ends.client.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while sent < 64 * MIB:
                sent += ends.client.send(b"x" * 16384)
                ends.server.sendall(b"tick")
        redirected = counted(datapath, pod)[Counter.REDIRECTED_BYTES]
        assert redirected <= MIB + sent // 16384 * 4 + 4
        assert len(receive(ends.server, sent)) == sent


def test_requests_and_replies_stay_redirected_for_ever(pod: LabPod, datapath: Datapath) -> None:
    block = b"x" * 65536
    with pair(pod) as ends:
        for _ in range(100):
            ends.client.sendall(block)
            assert len(receive(ends.server, len(block))) == len(block)
            ends.server.sendall(b"ok")
            receive(ends.client, 2)
        counters = counted(datapath, pod)
    assert counters[Counter.REDIRECTED_BYTES] == 100 * (len(block) + 2)
    assert counters[Counter.PASSED_UNREAD] == 0


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("mib", [3, 64, 256])
def test_a_blocking_reader_waits_after_a_large_upload(pod: LabPod, earlier: bool, mib: int) -> None:
    """Woken without data, a blocking recv() of a socket in a sockhash answers EAGAIN."""
    with pair(pod) as ends, ThreadPoolExecutor(1) as server:
        ends.client.settimeout(None)  # not Python's own poll(): the kernel must wait
        if earlier:
            ends.client.sendall(b"ask")
            receive(ends.server, 3)
            ends.server.sendall(b"answer")
            assert receive(ends.client, 6) == b"answer"
        received = server.submit(_serve_upload, ends.server, mib * MIB)
        for _ in range(mib):
            ends.client.sendall(b"x" * MIB)
        assert ends.client.recv(10) == b"done"
        assert received.result(10) == mib * MIB


def _serve_upload(end: socket.socket, size: int) -> int:
    got = 0
    while got < size and (chunk := end.recv(min(MIB, size - got))):
        got += len(chunk)
        if got % (16 * MIB) < len(chunk):
            time.sleep(0.001)
    time.sleep(0.1)
    end.sendall(b"done")
    return got


def test_a_blocking_reader_waits_after_its_half_close(pod: LabPod) -> None:
    with pair(pod) as ends, ThreadPoolExecutor(1) as server:
        ends.client.settimeout(None)
        reply = server.submit(_serve_half_closed, ends.server)
        ends.client.sendall(b"request")
        ends.client.shutdown(socket.SHUT_WR)
        assert ends.client.recv(10) == b"reply"
        assert reply.result(10) == b"request"


def _serve_half_closed(end: socket.socket) -> bytes:
    got = bytearray()
    while chunk := end.recv(100):
        got += chunk
    time.sleep(0.2)  # longer than a delayed ACK of the FIN
    end.sendall(b"reply")
    return bytes(got)


def test_a_stream_leaves_the_sockhash_and_stays_right(pod: LabPod, datapath: Datapath) -> None:
    """Both directions after a long upload: plain TCP, in order, nothing redirected any more."""
    with pair(pod) as ends, ThreadPoolExecutor(1) as server:
        received = server.submit(receive, ends.server, 32 * MIB)
        for _ in range(32):
            ends.client.sendall(b"x" * MIB)
        assert len(received.result(10)) == 32 * MIB
        before = counted(datapath, pod)[Counter.REDIRECTED_BYTES]
        for n in range(50):
            ends.server.sendall(b"pong%04d" % n)
            assert receive(ends.client, 8) == b"pong%04d" % n
            ends.client.sendall(b"ping%04d" % n)
            assert receive(ends.server, 8) == b"ping%04d" % n
        counters = counted(datapath, pod)
    assert counters[Counter.REDIRECTED_BYTES] == before <= MIB
    assert counters[Counter.PASSED_UNREAD] == 1


@pytest.mark.parametrize("seed", range(4))
def test_streams_arrive_intact_over_the_switch_to_tcp(pod: LabPod, seed: int) -> None:
    """Random write and read sizes, a dawdling reader, several MiB: one change from queue to TCP."""
    chance = random.Random(seed)
    payload = chance.randbytes(4 * MIB)
    with pair(pod) as ends:
        ends.client.setblocking(False)
        ends.server.setblocking(False)
        sent, got = 0, bytearray()
        deadline = time.monotonic() + 20
        while len(got) < len(payload) and time.monotonic() < deadline:
            for _ in range(chance.randrange(20)):
                try:
                    sent += ends.client.send(payload[sent : sent + chance.randrange(1, 60_000)])
                except BlockingIOError:
                    break
            for _ in range(chance.randrange(10)):
                try:
                    got += ends.server.recv(chance.randrange(1, 40_000))
                except BlockingIOError:
                    break
        assert hashlib.sha256(got).digest() == hashlib.sha256(payload).digest()


def test_two_pods_with_the_same_loopback_tuple(
    node: Node, enrollment: Enrollment, datapath: Datapath
) -> None:
    """Sidecar to application by 127.0.0.1, the same ports in both pods: keys must not meet."""
    pods = [node.pod("one"), node.pod("two")]
    ends: list[tuple[socket.socket, socket.socket]] = []
    for pod in pods:
        enrollment.enroll(pod.name, pod.netns, pod.cgroup, Mode.EBPF, Accelerate.ON)
        listener = pod_socket(pod)
        listener.bind(("127.0.0.1", 8080))
        listener.listen()
        client = pod_socket(pod, sidecar=True)
        client.bind(("127.0.0.1", 40_000))
        connect_as(pod, client, ("127.0.0.1", 8080), uid=1337, gid=1337)
        server, _ = listener.accept()
        listener.close()
        for end in (client, server):
            end.settimeout(5)
        ends.append((client, server))
    for text, (client, server) in zip((b"one", b"two"), ends, strict=True):
        client.sendall(text)
        server.sendall(text.upper())
    for text, (client, server) in zip((b"one", b"two"), ends, strict=True):
        assert server.recv(10) == text
        assert client.recv(10) == text.upper()
    for pod in pods:
        assert counted(datapath, pod)[Counter.REDIRECTED_MESSAGES] == 2
    for client, server in ends:
        client.close()
        server.close()


def test_nothing_is_left_in_the_maps(pod: LabPod, datapath: Datapath) -> None:
    for _ in range(20):
        with pair(pod) as ends:
            ends.client.sendall(b"x")
            ends.server.recv(1)
    refused = pod_socket(pod)
    with pytest.raises(ConnectionRefusedError):
        refused.connect(SERVICE)
    refused.close()
    assert [
        f for f in datapath.maps.flows() if f.flow.client_netns == netns_cookie(pod.netns)
    ] == []


def test_without_a_sidecar_connections_are_refused(pod: LabPod) -> None:
    client = pod_socket(pod)
    with client, pytest.raises(ConnectionRefusedError):
        client.connect(SERVICE)


def test_a_bare_connection_to_the_sidecars_port_is_refused(pod: LabPod, datapath: Datapath) -> None:
    """What comes without an original destination must not reach a listener that trusts in one."""
    listener = pod_socket(pod, sidecar=True)
    listener.bind(("0.0.0.0", OUTBOUND))
    listener.listen()
    with listener, pod_socket(pod) as client, pytest.raises(ConnectionRefusedError):
        client.connect((pod.ip, OUTBOUND))
    assert counted(datapath, pod)[Counter.REFUSED_NO_FLOW] == 1


def test_uninstall_loses_no_byte_of_a_reader_at_work(node: Node, tmp_path: Path) -> None:
    """Freeing a sockhash discards what is unread in it; a reader that reads must lose nothing."""
    lab = node.pod("pod")
    datapath = Datapath(ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}")
    enrollment = Enrollment(Records(tmp_path / "own"), datapath)
    enrollment.enroll("pod", lab.netns, lab.cgroup, Mode.EBPF, Accelerate.ON)
    with pair(lab) as ends, ThreadPoolExecutor(1) as reader:
        ends.server.getsockopt(socket.SOL_IP, 80, 16)  # answered: nothing to wait for
        sent = 200
        received = reader.submit(_read_slowly, ends.server, sent * 4096)
        for n in range(sent):
            ends.client.sendall(b"%c" % (n % 256) * 4096)
            if n == sent // 2:
                assert enrollment.uninstall() == []
        data = received.result(20)
    assert data == b"".join(b"%c" % (n % 256) * 4096 for n in range(sent))


def _read_slowly(end: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size and (chunk := end.recv(8192)):
        got += chunk
        time.sleep(0.001)
    return bytes(got)
