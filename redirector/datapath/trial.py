"""A short-circuited connection made by hand, to try out what the running kernel does with it.

Two connected loopback sockets of this process get their state, a flow and their places in the
sockhash from here, instead of from the connect and sockops programs: no cgroup is needed.
"""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from redirector.datapath import libbpf
from redirector.datapath.layout import Address, Flow, FlowFlag, FlowKey, Side, SockState

#: Longest wait for bytes that ought to be there already, seconds.
TIMEOUT = 1.0
#: So small that a stalled reader holds its sender back after a few hundred kilobytes of TCP.
_BUFFER = 1 << 16
_ID = 1
_PASS = 2  # enum verdict
_SO_COOKIE = 57  # asm-generic/socket.h; Python has no name for it
# linux/tcp.h
_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ = 19, 20, 21
_RECEIVE_QUEUE, _SEND_QUEUE = 1, 2
_FIN, _PSH, _ACK = 1, 8, 16
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # netdevice(7)


@dataclass(frozen=True)
class TrialMaps:
    """Descriptors of the maps that a short-circuited connection lives in."""

    states: int
    flows: int
    sockets: int
    arrived: int


class Trial:
    """Both ends of a connection, the client's in the sockhash from the start."""

    def __init__(self, maps: TrialMaps, client: socket.socket, listener: socket.socket) -> None:
        self._maps = maps
        self._listener = listener
        self._cookies: list[bytes] = []
        self.client = client
        # No namespace has this cookie, so this flow meets no other.
        self._key = FlowKey(netns=2**64 - 1, client=_address(client), server=_address(listener))
        self._key.client_port = client.getsockname()[1]
        self._key.server_port = listener.getsockname()[1]
        libbpf.map_update(maps.flows, bytes(self._key), bytes(Flow(id=_ID)))
        self._enter(client, Side.CLIENT)

    def accept(self) -> socket.socket:
        """Accept the connection and bring its other end into the sockhash, too."""
        server, _ = self._listener.accept()
        server.settimeout(TIMEOUT)
        self._enter(server, Side.SERVER)
        return server

    def flow(self) -> Flow:
        """What the programs have noted of it."""
        raw = libbpf.map_lookup(self._maps.flows, bytes(self._key), ctypes.sizeof(Flow))
        if raw is None:
            raise OSError("the flows map lost its entry")
        return Flow.from_buffer_copy(raw)

    def pass_on(self) -> None:
        """From now on the client's bytes go by TCP, as behind a stalled reader."""
        flow = self.flow()
        flow.verdict[Side.CLIENT] = _PASS
        libbpf.map_update(self._maps.flows, bytes(self._key), bytes(flow))

    def resend(self, data: bytes, new: int) -> None:
        """Bring the server one segment of the client's, of which it lacks the last `new` bytes."""
        resend(self.client, data, new)

    def forget(self) -> None:
        """Delete the flow, and what is known of both ends; all else goes with the sockets."""
        libbpf.map_delete(self._maps.flows, bytes(self._key))
        for cookie in self._cookies:
            libbpf.map_delete(self._maps.arrived, cookie)

    def _enter(self, end: socket.socket, side: Side) -> None:
        descriptor = end.fileno().to_bytes(4, "little")
        cookie = end.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
        state = SockState(flow=self._key, id=_ID, side=side, flags=FlowFlag.ACCELERATE)
        libbpf.map_update(self._maps.states, descriptor, bytes(state))
        libbpf.map_update(self._maps.sockets, cookie, descriptor)
        self._cookies.append(cookie)
        flow = self.flow()
        flow.socket[side] = int.from_bytes(cookie, "little")
        libbpf.map_update(self._maps.flows, bytes(self._key), bytes(flow))


@contextlib.contextmanager
def trial(maps: TrialMaps, *, deferred: bool = False) -> Iterator[Trial]:
    """A connection that has not been accepted yet; `deferred` as by TCP_DEFER_ACCEPT."""
    with socket.socket() as listener, socket.socket() as client:
        for end in (listener, client):
            end.settimeout(TIMEOUT)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        if deferred:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        made = Trial(maps, client, listener)
        try:
            yield made
        finally:
            made.forget()


def resend(sender: socket.socket, data: bytes, new: int, *, last: bool = False) -> None:
    """Bring the peer of an IPv4 socket one segment of it, of which it lacks the last `new` bytes.

    To be called in the socket's network namespace. With `last` the segment ends the stream (FIN).
    """
    sequences = []
    sender.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    for queue in (_SEND_QUEUE, _RECEIVE_QUEUE):
        sender.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, queue)
        sequences.append(sender.getsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ))
    sender.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, -1)
    start = sequences[0] - (len(data) - new)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        ends = (sender.getsockname(), sender.getpeername())
        raw.bind((ends[0][0], 0))
        flags = _PSH | _ACK | (_FIN if last else 0)
        raw.sendto(_segment(ends, start, sequences[1], flags, data), (ends[1][0], 0))


def enter_scratch_namespace() -> None:
    """Move this thread, for good, into a network namespace that has nothing but its loopback."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"no network namespace to try the kernel in: {os.strerror(code)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))


def _segment(
    ends: tuple[tuple[str, int], tuple[str, int]],
    sequence: int,
    acknowledged: int,
    flags: int,
    data: bytes,
) -> bytes:
    """A TCP segment with data (RFC 9293, 3.1), from the first of the ends to the second."""
    (source, source_port), (destination, destination_port) = ends
    head = struct.pack(
        "!HHIIBBHHH",
        *(source_port, destination_port, sequence % 2**32, acknowledged % 2**32),
        *(5 << 4, flags, 0xFFFF, 0, 0),
    )
    pseudo = socket.inet_aton(source) + socket.inet_aton(destination)
    pseudo += struct.pack("!HH", socket.IPPROTO_TCP, len(head) + len(data))
    summed = pseudo + head + data + bytes(len(data) % 2)
    total = sum(word for (word,) in struct.iter_unpack("!H", summed))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:16] + struct.pack("!H", total ^ 0xFFFF) + head[18:] + data


def _address(end: socket.socket) -> Address:
    return Address.of(IPv4Address(end.getsockname()[0]))
