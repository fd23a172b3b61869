"""Blocking readers of short-circuited sockets.

Woken without data, a blocking recv() of a socket in a sockhash answers EAGAIN, because
tcp_bpf_recvmsg_parser() waits once: who may be woken so must have left the sockhash.
"""

import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerated import MIB, pair, receive

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.machine import ensure_bpffs
from redirector.model import Accelerate, Mode
from redirector.records import Records

pytestmark = pytest.mark.root


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("mib", [3, 64, 256])
def test_a_blocking_reader_waits_after_a_large_upload(pod: LabPod, earlier: bool, mib: int) -> None:
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
