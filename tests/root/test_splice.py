"""splice() from a short-circuited socket, as Go's io.Copy and HAProxy use it."""

import ctypes
import errno
import os
import random
import select
import socket
from enum import StrEnum

import pytest
from accelerated import pair, receive

from redirector.datapath.hooks import SPLICE_HOOK
from redirector.datapath.layout import Defect
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode

pytestmark = pytest.mark.root

TCP_ZEROCOPY_RECEIVE = 35  # linux/tcp.h; all zero: where to, how much, how much there is
SPLICE_F_MOVE, SPLICE_F_NONBLOCK = 1, 2  # fcntl.h
BODY = random.Random(1).randbytes(200_000)


class How(StrEnum):
    SPLICED = "spliced"
    COPIED = "copied"
    STUCK = "stuck"


def echo(end: socket.socket, seconds: float = 5) -> How:
    """Bring back what comes until it ends: through a pipe, and by copying where that is refused.

    As internal/poll.Splice of Go does it: EINVAL from the first splice() means that the socket
    cannot be spliced from; after EAGAIN it waits for an edge of epoll.
    """
    reader, writer = os.pipe()
    end.setblocking(False)
    poll = select.epoll()
    poll.register(end, select.EPOLLIN | select.EPOLLET)
    while True:
        try:
            size = os.splice(end.fileno(), writer, 1 << 16, flags=SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        except BlockingIOError:
            if not poll.poll(seconds):
                return How.STUCK
            continue
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            end.settimeout(seconds)
            while chunk := end.recv(1 << 16):
                end.sendall(chunk)
            return How.COPIED
        if not size:
            return How.SPLICED
        end.settimeout(seconds)
        end.sendall(os.read(reader, size))
        end.setblocking(False)


def test_every_byte_arrives_or_the_kernel_is_known_to_lose_them(
    pod: LabPod, datapath: Datapath
) -> None:
    known = Defect.SPLICE_OUT in Defect(datapath.maps.about().defects)
    with pair(pod) as ends:
        ends.client.sendall(BODY)
        ends.client.shutdown(socket.SHUT_WR)
        how = pod.call(echo, ends.server, sidecar=True)
        ends.server.shutdown(socket.SHUT_WR)
        assert (receive(ends.client, len(BODY) + 1) == BODY) is not known
        assert how == (How.COPIED if datapath.refuses_splice() else How.SPLICED)


def test_what_is_not_short_circuited_is_spliced(node: Node, enrollment: Enrollment) -> None:
    pod = node.pod("pod")
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, Accelerate.OFF)
    with pair(pod) as ends:
        ends.client.sendall(BODY[:1000])
        ends.client.shutdown(socket.SHUT_WR)
        assert pod.call(echo, ends.server, sidecar=True) == How.SPLICED
        assert receive(ends.client, 1000) == BODY[:1000]


def test_zerocopy_receive_is_refused_or_sees_nothing(pod: LabPod, datapath: Datapath) -> None:
    """Of redirected bytes alone: TCP's would make a kernel fall over that does not refuse it."""

    def ask(end: socket.socket) -> int:
        libc, asked = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(24)
        size = ctypes.byref(ctypes.c_uint32(24))
        level, name = socket.IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE
        failed = libc.getsockopt(end.fileno(), level, name, asked, size)
        return ctypes.get_errno() if failed else int.from_bytes(asked.raw, "little")

    with pair(pod) as ends:
        ends.client.sendall(BODY)
        told = pod.call(ask, ends.server, sidecar=True)
        assert told == (errno.ENOPROTOOPT if datapath.refuses_splice() else 0)
        assert receive(ends.server, len(BODY)) == BODY


def test_files_and_pipes_are_spliced(pod: LabPod) -> None:
    """Only sockets of ours are refused."""

    def through_pipes() -> bytes:
        (first, into), (second, out) = os.pipe(), os.pipe()
        os.write(into, b"piped")
        assert os.splice(first, out, 100) == 5
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
            client.sendall(b"local")
            assert os.splice(server.fileno(), out, 100) == 5
        return os.read(second, 100)

    assert pod.call(through_pipes) == b"pipedlocal"


def test_the_hook_is_a_short_circuited_pods_alone(
    node: Node, enrollment: Enrollment, datapath: Datapath
) -> None:
    for name, accelerate in (("with", Accelerate.ON), ("without", Accelerate.OFF)):
        pod = node.pod(name)
        enrollment.enroll(name, pod.netns, pod.cgroup, Mode.EBPF, accelerate)
    pins = datapath.generation.directory / "pods"
    assert not (pins / "without" / SPLICE_HOOK[0]).exists()
    pin = pins / "with" / SPLICE_HOOK[0]
    assert pin.exists() is datapath.refuses_splice()
    assert [status.missing for status in enrollment.status()] == [(), ()]
    if pin.exists():
        pin.unlink()
        assert [status.missing for status in enrollment.status()] == [(SPLICE_HOOK[0],), ()]
    enrollment.unenroll("with")
    assert not pin.exists()
