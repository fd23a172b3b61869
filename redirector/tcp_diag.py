"""The TCP sockets of the calling thread's network namespace, asked of the kernel (sock_diag(7)).

The kernel filters: after a rush of connections /proc/net/tcp takes seconds to print TIME_WAIT.
"""

import os
import socket
import struct
from collections.abc import Collection, Iterator
from ipaddress import ip_address
from typing import NamedTuple

from redirector.errors import MachineError
from redirector.model import IPAddress

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SECONDS = 10.0
# Bits by include/net/tcp_states.h.
_LISTEN = 1 << 10
#: All but TIME_WAIT, CLOSE and LISTEN.
_OPEN = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11))


#: Bit of inet_diag_req_v2.idiag_ext that asks for the attribute of this number.
_INET_DIAG_INFO = 2
_MESSAGE_SIZE = 72
#: struct tcp_info.tcpi_bytes_acked; tcpi_bytes_received follows (linux/tcp.h).
_BYTES_ACKED = 120

#: Local address and port, remote address and port.
Ends = tuple[IPAddress, int, IPAddress, int]
#: Bytes that TCP has delivered to the other end, and that it has received.
Traffic = dict[Ends, tuple[int, int]]


class _Found(NamedTuple):
    family: int
    ends: Ends
    inode: int
    attributes: bytes

    @property
    def local(self) -> IPAddress:
        return self.ends[0]


def open_connections(ports: Collection[int]) -> Iterator[tuple[IPAddress, int]]:
    """Local address and port of each connection open on one of these local ports; 0 is any.

    MachineError on a kernel that does not tell.
    """
    for port in ports:
        yield from ((found.local, port) for found in _sockets(_OPEN, port))


def open_ends() -> Iterator[Ends]:
    """Both ends of each open connection."""
    yield from (found.ends for found in _sockets(_OPEN, 0))


def listening(port: int) -> Iterator[tuple[int, int]]:
    """Inode and address family of each socket that listens on a port."""
    yield from ((found.inode, found.family) for found in _sockets(_LISTEN, port))


def traffic() -> Traffic:
    """What has gone and come on each open connection that was opened here, by TCP."""
    found: Traffic = {}
    for one in _sockets(_OPEN, 0, 1 << (_INET_DIAG_INFO - 1)):
        info = _attribute(one.attributes, _INET_DIAG_INFO)
        if len(info) >= _BYTES_ACKED + 16:
            acked, received = struct.unpack_from("=QQ", info, _BYTES_ACKED)
            # Who connected had its SYN acknowledged, too (RFC 4898).
            found[one.ends] = max(acked - 1, 0), received
    return found


def _attribute(attributes: bytes, wanted: int) -> bytes:
    """The value of a struct nlattr; b"" when there is none."""
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == wanted:
            return attributes[4:length]
        attributes = attributes[max((length + 3) & ~3, 4) :]
    return b""


def _sockets(states: int, port: int, extensions: int = 0) -> Iterator[_Found]:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
            diag.settimeout(_SECONDS)
            for family in (socket.AF_INET, socket.AF_INET6):
                diag.send(_request(family, states, port, extensions))
                yield from _answers(diag)
    except OSError as error:
        raise MachineError(
            f"the kernel does not list its TCP sockets ({error.strerror or error});"
            " load its module tcp_diag"
        ) from None


def _request(family: int, states: int, local_port: int, extensions: int) -> bytes:
    """struct nlmsghdr, then struct inet_diag_req_v2 with its ports in network order."""
    request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, extensions, states)
    request += struct.pack("!H", local_port) + bytes(46)
    flags = _NLM_F_REQUEST | _NLM_F_DUMP
    return struct.pack("=IHHII", 16 + len(request), _SOCK_DIAG_BY_FAMILY, flags, 0, 0) + request


def _answers(diag: socket.socket) -> Iterator[_Found]:
    """The dump's struct inet_diag_msg (linux/inet_diag.h), up to its end."""
    while True:
        data = memoryview(diag.recv(1 << 16))
        while data:
            length, kind = struct.unpack_from("=IH", data)
            message = data[16:length]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", message)[0]
                raise OSError(code, os.strerror(code))
            family = message[0]
            size = 16 if family == socket.AF_INET6 else 4
            ports = struct.unpack_from("!HH", message, 4)
            local = _unmapped(ip_address(bytes(message[8 : 8 + size])))
            remote = _unmapped(ip_address(bytes(message[24 : 24 + size])))
            (inode,) = struct.unpack_from("=I", message, 68)
            ends = (local, ports[0], remote, ports[1])
            yield _Found(family, ends, inode, bytes(message[_MESSAGE_SIZE:]))
            data = data[(length + 3) & ~3 :]


def _unmapped(address: IPAddress) -> IPAddress:
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped or address
