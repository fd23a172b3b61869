"""What the short-circuit promises: the bytes that TCP would have delivered, in their order."""

import random
import select
import socket
import time

import pytest
from accelerated import MIB, OUTBOUND, SERVICE, counted, pair, readable, receive
from sockets import pod_socket
from waiting import eventually

from redirector.datapath.layout import Counter, Defect
from redirector.datapath.pins import Datapath
from redirector.datapath.trial import resend
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode
from redirector.network import netns_cookie, within

pytestmark = pytest.mark.root


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


def test_the_last_segment_comes_to_who_has_half_closed(pod: LabPod, datapath: Datapath) -> None:
    """It makes the end closed before it is read: nothing of it is read twice, no entry is left."""
    before = datapath.maps.fills()["arrived"]
    with pair(pod) as ends:
        ends.client.sendall(b"request")
        assert receive(ends.server, 7) == b"request"
        ends.server.sendall(b"answer")  # so that the client's end stays in the sockhash
        assert receive(ends.client, 6) == b"answer"
        ends.client.shutdown(socket.SHUT_WR)
        ends.server.sendall(bytes(MIB + 1))
        ends.server.sendall(b"a" * 1000)
        assert receive(ends.client, MIB + 1001)[-1000:] == b"a" * 1000
        segment = b"a" * 900 + b"b" * 100
        within(pod.netns, lambda: resend(ends.server, segment, new=100, last=True))
        assert receive(ends.client, 1001) == b"b" * 100
        assert datapath.maps.fills()["arrived"] == before


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
        client.connect(("127.0.0.1", 8080))
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
    def arrived() -> int:
        return datapath.maps.fills()["arrived"][0]

    before = arrived()
    with pair(pod) as ends:
        # TCP brings the last byte.
        ends.client.sendall(bytes(MIB))
        ends.client.sendall(b"x")
        receive(ends.server, MIB + 1)
        assert arrived() == before + 1
    eventually("nothing of a closed connection", lambda: arrived() == before)
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
