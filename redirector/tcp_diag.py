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


class _Found(NamedTuple):
    family: int
    local: IPAddress
    inode: int


def open_connections(ports: Collection[int]) -> Iterator[tuple[IPAddress, int]]:
    """Local address and port of each connection open on one of these local ports; 0 is any.

    MachineError on a kernel that does not tell.
    """
    for port in ports:
        yield from ((found.local, port) for found in _sockets(_OPEN, port))


def listening(port: int) -> Iterator[tuple[int, int]]:
    """Inode and address family of each socket that listens on a port."""
    yield from ((found.inode, found.family) for found in _sockets(_LISTEN, port))


def _sockets(states: int, port: int) -> Iterator[_Found]:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
            diag.settimeout(_SECONDS)
            for family in (socket.AF_INET, socket.AF_INET6):
                diag.send(_request(family, states, port))
                yield from _answers(diag)
    except OSError as error:
        raise MachineError(
            f"the kernel does not list its TCP sockets ({error.strerror or error});"
            " load its module tcp_diag"
        ) from None


def _request(family: int, states: int, local_port: int) -> bytes:
    """struct nlmsghdr, then struct inet_diag_req_v2 with its ports in network order."""
    request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, states)
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
            local = _unmapped(ip_address(bytes(message[8 : 8 + size])))
            (inode,) = struct.unpack_from("=I", message, 68)
            yield _Found(family, local, inode)
            data = data[(length + 3) & ~3 :]


def _unmapped(address: IPAddress) -> IPAddress:
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped or address
