"""Backpressure as in TCP: what a reader leaves unread is bounded, and its sender is held back."""

import errno
import hashlib
import random
import resource
import select
import socket
import struct
import time
from collections import Counter as Counts
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from accelerated import MIB, OUTBOUND, SERVICE, Pair, counted, pair, readable, receive

from redirector.datapath.layout import Counter
from redirector.datapath.pins import Datapath
from redirector.lab import LabPod

pytestmark = pytest.mark.root

_SO_MEMINFO = 55  # asm-generic/socket.h


def send_until_held(ends: Pair, size: int, meanwhile: Callable[[], None] = lambda: None) -> int:
    """What the client can send, `size` bytes at a time, until EAGAIN: within 64 MiB."""
    ends.client.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while sent < 64 * MIB:
            sent += ends.client.send(b"x" * size)
            meanwhile()
    return sent


def test_a_stalled_reader_holds_the_sender_back(pod: LabPod, datapath: Datapath) -> None:
    with pair(pod) as ends:
        sent = send_until_held(ends, 65536)
        ends.client.settimeout(10)
        counters = counted(datapath, pod)
        assert counters[Counter.REDIRECTED_BYTES] <= MIB
        assert counters[Counter.PASSED_UNREAD] == 1
        assert len(receive(ends.server, sent)) == sent


def test_a_reply_gives_no_budget_for_bytes_left_unread(pod: LabPod, datapath: Datapath) -> None:
    """The server talks all the time and never reads: what the client may pile up stays bounded."""
    with pair(pod) as ends:
        sent = send_until_held(ends, 16384, lambda: ends.server.sendall(b"tick"))
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


def test_tiny_messages_to_a_stalled_reader_are_bounded(pod: LabPod, datapath: Datapath) -> None:
    """Each costs the kernel 1 KiB, whatever it holds: bytes alone are no bound."""
    sent = 10_000
    with pair(pod) as ends:
        client, server = ends.client, ends.server
        for _ in range(sent):
            client.sendall(b"x")
            # A reader that talks meanwhile gets no other bound.
            server.sendall(b"y")
        counters = counted(datapath, pod)
        assert counters[Counter.REDIRECTED_MESSAGES] <= 2 * 4096
        assert counters[Counter.PASSED_UNREAD] >= 1
        for end, byte in ((server, b"x"), (client, b"y")):
            got = b""
            while len(got) < sent:
                got += end.recv(sent)
            assert got == byte * sent


def test_tiny_requests_and_replies_stay_redirected(pod: LabPod, datapath: Datapath) -> None:
    with pair(pod) as ends:
        client, server = ends.client, ends.server
        for _ in range(6000):
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            server.sendall(b"y")
            assert client.recv(1) == b"y"
        counters = counted(datapath, pod)
    assert counters[Counter.REDIRECTED_MESSAGES] == 12_000


def test_a_reader_that_is_late_reads_all_with_one_edge(pod: LabPod) -> None:
    """nginx, Netty and tokio take a recv() that answers less than asked for as the end."""
    piece, size = 50_000, 65_537
    with pair(pod) as ends, select.epoll() as poll:
        poll.register(ends.server, select.EPOLLIN | select.EPOLLET)
        ends.client.setblocking(False)
        for _ in range(MIB // piece + 2):
            ends.client.sendall(b"x" * piece)
        redirected = MIB // piece * piece
        deadline = time.monotonic() + 10
        while (waiting := readable(ends.server)) <= redirected:
            assert time.monotonic() < deadline, f"nothing came by TCP after {waiting} bytes"
        assert poll.poll(10)
        got = size
        while got % size == 0:
            got += len(ends.server.recv(size))
        assert got - size >= waiting


@pytest.mark.parametrize("talks", [False, True])
def test_a_direction_holds_no_more_than_tcp_would_and_two_mib(pod: LabPod, talks: bool) -> None:
    """In the receiver's memory (SO_MEMINFO), redirected or not, also while the other end talks."""
    with pair(pod) as ends:

        def talk() -> None:
            if talks:
                ends.server.sendall(b"tick")
                ends.client.recv(4)

        sent = send_until_held(ends, 10_000, talk)
        assert _held(ends.server) <= 2 * MIB
        assert len(receive(ends.server, sent)) == sent


def test_a_blocked_sender_waits_and_is_let_on(pod: LabPod) -> None:
    """A blocking send() to a stalled reader: it blocks, answers no error, and loses nothing."""
    size = 32 * MIB
    with pair(pod) as ends, ThreadPoolExecutor(1) as sender:
        ends.client.settimeout(None)
        sending = sender.submit(ends.client.sendall, b"x" * size)
        time.sleep(0.2)
        assert not sending.done()
        assert len(receive(ends.server, size)) == size
        assert sending.result(10) is None


def test_a_thousand_stalled_connections(pod: LabPod, datapath: Datapath) -> None:
    """No sender is told ENOMEM, whatever the node has for TCP, and no byte is lost."""
    told, excess, whole = pod.call(_stall, 1000, timeout=120)
    assert told == {errno.EAGAIN: 1000}
    assert excess <= 2 * MIB
    assert whole == [True] * 10
    counters = counted(datapath, pod)
    assert counters[Counter.ACCELERATED] == 2000
    assert counters[Counter.PASSED_UNREAD] + counters[Counter.PASSED_MEMORY] == 1000


def _stall(count: int) -> tuple[dict[int, int], int, list[bool]]:
    """What senders were told, and how often; most that a reader held past its buffer; whether
    those that are read in the end, every hundredth, are whole."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    told: Counts[int] = Counts()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("0.0.0.0", OUTBOUND))
        listener.listen()
        ends: list[tuple[socket.socket, socket.socket, int]] = []
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            client.connect(SERVICE)
            server = stack.enter_context(listener.accept()[0])
            for end in (client, server):
                # Nothing lingers in the kernel afterwards, nor when this fails.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.setblocking(False)
            sent = 0
            try:
                while sent < 64 * MIB:
                    sent += client.send(bytes(65536))
            except OSError as error:
                told[error.errno or 0] += 1
            ends.append((client, server, sent))
        excess = max(_held(server) for _, server, _ in ends)
        whole = []
        for n, (client, server, sent) in enumerate(ends):
            if n % 100 == 0:
                server.settimeout(20)
                whole.append(len(receive(server, sent)) == sent)
            client.close()
            server.close()
    return dict(told), excess, whole


def _held(end: socket.socket) -> int:
    """Bytes that a socket's unread bytes take in the kernel, past its receive buffer."""
    raw = end.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)
    taken, buffer = struct.unpack_from("2I", raw)  # sock_diag(7): SK_MEMINFO_RMEM_ALLOC, _RCVBUF
    return int(taken) - int(buffer)
