"""Sockets that the short-circuit leaves alone and options that it withholds, each by its reason."""

import errno
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from accelerated import OUTBOUND, SERVICE, Pair, counted, pair, readable, receive
from sockets import pod_socket

from redirector.datapath.layout import Counter, Defect, Side
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode

pytestmark = pytest.mark.root

SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000
TCP_ULP = 31
PAGE = 4096


def send_with_syn(client: socket.socket, data: bytes) -> None:
    """connect() and the first bytes at once: TCP Fast Open (RFC 7413)."""
    client.settimeout(None)  # else it answers EINPROGRESS
    client.sendto(data, socket.MSG_FASTOPEN, SERVICE)


@contextmanager
def fast_open(pod: LabPod) -> Iterator[socket.socket]:
    """The sidecar's listener with TCP Fast Open, which needs no cookie here."""
    pod.run(["sysctl", "-q", "net.ipv4.tcp_fastopen=0x607"], check=True)
    options = [(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)]
    with pod_socket(pod, sidecar=True, options=options) as listener:
        listener.bind(("0.0.0.0", OUTBOUND))
        listener.listen()
        yield listener


def converse(ends: Pair) -> None:
    for n in range(3):
        ends.client.sendall(b"ask%d" % n)
        assert receive(ends.server, 4) == b"ask%d" % n
        ends.server.sendall(b"answer%d" % n)
        assert receive(ends.client, 7) == b"answer%d" % n


def test_a_syn_with_data(pod: LabPod, datapath: Datapath) -> None:
    with fast_open(pod) as listener, pod_socket(pod) as client:
        send_with_syn(client, b"early")
        server, _ = listener.accept()
        with server:
            ends = Pair(client, server)
            for end in (client, server):
                end.settimeout(10)
            assert readable(server) == 5
            assert receive(server, 5) == b"early"
            converse(ends)
            (found,) = datapath.maps.flows()
            assert list(found.flow.socket) == [0, 0]
        counters = counted(datapath, pod)
    assert counters[Counter.PASSED_FAST_OPEN] == 2
    assert counters[Counter.ACCELERATED] == counters[Counter.REDIRECTED_MESSAGES] == 0


@pytest.mark.parametrize("defer_accept", [False, True])
def test_bytes_sent_before_the_other_end_is_there(
    pod: LabPod, datapath: Datapath, defer_accept: bool
) -> None:
    """With a deferred accept nobody is there at the first send(): then both ends stay on TCP."""
    with pair(pod, defer_accept=defer_accept, first=b"1111") as ends:
        told = defer_accept or Defect.FIONREAD not in datapath.defects()
        assert readable(ends.server) == (4 if told else 0)
        assert receive(ends.server, 4) == b"1111"
        converse(ends)
        (found,) = datapath.maps.flows()
        counters = counted(datapath, pod)
    assert [bool(cookie) for cookie in found.flow.socket] == [not defer_accept] * len(Side)
    assert counters[Counter.PASSED_NO_PEER] == (2 if defer_accept else 0)
    assert bool(counters[Counter.REDIRECTED_MESSAGES]) is not defer_accept


@pytest.mark.parametrize("side", list(Side))
def test_a_socket_that_waits_for_zerocopys_word(
    pod: LabPod, datapath: Datapath, side: Side
) -> None:
    """Set before there is a connection, by the client or on the listener."""
    option = [(socket.SOL_SOCKET, SO_ZEROCOPY, 1)]
    with (
        pod_socket(pod, sidecar=True, options=option if side is Side.SERVER else ()) as listener,
        pod_socket(pod, options=option if side is Side.CLIENT else ()) as client,
    ):
        listener.bind(("0.0.0.0", OUTBOUND))
        listener.listen()
        client.connect(SERVICE)
        server, _ = listener.accept()
        with server:
            for end in (client, server):
                end.settimeout(10)
            sender, reader = (client, server) if side is Side.CLIENT else (server, client)
            sender.send(bytes(20_000), MSG_ZEROCOPY)
            assert len(receive(reader, 20_000)) == 20_000
            sender.setblocking(False)
            assert told_of_completion(sender)
        counters = counted(datapath, pod)
    assert counters[Counter.PASSED_ZEROCOPY] == 1
    assert counters[Counter.REDIRECTED_MESSAGES] == 0


def told_of_completion(sender: socket.socket) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return bool(sender.recvmsg(0, 512, socket.MSG_ERRQUEUE)[1])
        except BlockingIOError:
            time.sleep(0.001)
    return False


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize(
    ("level", "option", "value", "reason"),
    [
        (socket.SOL_SOCKET, SO_ZEROCOPY, b"\1\0\0\0", Counter.WITHHELD_ZEROCOPY),
        (socket.IPPROTO_TCP, TCP_ULP, b"tls\0", Counter.WITHHELD_KTLS),
    ],
)
def test_an_accelerated_socket_does_without(
    pod: LabPod,
    datapath: Datapath,
    side: Side,
    level: int,
    option: int,
    value: bytes,
    reason: Counter,
) -> None:
    """As on a kernel that does not know the option; the short-circuit goes on."""
    with pair(pod) as ends:
        converse(ends)
        end = ends.client if side is Side.CLIENT else ends.server
        with pytest.raises(OSError, match="Protocol not available") as refused:
            pod.call(end.setsockopt, level, option, value, sidecar=side is Side.SERVER)
        assert refused.value.errno == errno.ENOPROTOOPT
        converse(ends)
        counters = counted(datapath, pod)
    assert counters[reason] == 1
    assert counters[Counter.REDIRECTED_MESSAGES] == 12


def test_sockets_that_are_not_accelerated_have_every_option(
    node: Node, enrollment: Enrollment
) -> None:
    pod = node.pod("pod")
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, Accelerate.OFF)
    with pair(pod) as ends:
        pod.call(ends.client.setsockopt, socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        assert ends.client.getsockopt(socket.SOL_SOCKET, SO_ZEROCOPY) == 1
        # The kernel's own answer: it has TLS, or it has not.
        try:
            pod.call(ends.client.setsockopt, socket.IPPROTO_TCP, TCP_ULP, b"tls\0")
        except OSError as error:
            assert error.errno == errno.ENOENT  # noqa: PT017


def test_other_options_are_as_ever(pod: LabPod) -> None:
    """Among them values longer than what the kernel shows to programs."""
    with pair(pod) as ends:
        client = ends.client
        pod.call(client.setsockopt, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        pod.call(client.setsockopt, socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 4) == b"reno"
        long = b"lo\0" + bytes(2 * PAGE)
        pod.call(client.setsockopt, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, long)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)[:3] == b"lo\0"
        with pytest.raises(OSError, match="Protocol not available"):
            pod.call(client.setsockopt, socket.SOL_SOCKET, 0x7FFF, 1)
