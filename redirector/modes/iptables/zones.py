"""What conntrack knows of a zone (ctnetlink, linux/netfilter/nfnetlink_conntrack.h).

By hand, because there may be tens of thousands of entries: the kernel filters by zone since Linux
6.8 only, and a library decodes each of them whole.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from redirector.errors import DatapathError
from redirector.network import within

# Of linux/netfilter/nf_conntrack_common.h.
_SEEN_REPLY = 1 << 1
_DST_NAT = 1 << 5

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2
_TUPLE_ORIG, _STATUS, _ZONE = 1, 3, 18
_NLA_NESTED = 1 << 15
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SECONDS = 10.0


class _Entry(NamedTuple):
    family: int
    #: CTA_TUPLE_ORIG as the kernel wrote it.
    original: bytes
    status: int


class Questions(NamedTuple):
    """Whether any was asked a while ago, and whether one has had no answer yet."""

    asked: bool
    unanswered: bool


def questions(netns: Path, zone: int) -> Questions:
    """Look for what was asked in this zone of a namespace.

    A kernel that does not tell is taken to say yes. Of a socket that asks again and again only the
    first answer is known.
    """

    def ask() -> Questions:
        with _conntrack() as conntrack:
            found = [bool(entry.status & _SEEN_REPLY) for entry in _entries(conntrack, zone)]
        return Questions(bool(found), not all(found))

    try:
        return within(netns, ask)
    except OSError:
        return Questions(True, True)


def forget_direct(netns: Path, zone: int) -> None:
    """Let conntrack forget what is tracked in this zone and not redirected.

    That was asked when the zone's rules stood and the redirecting ones did not. As long as its
    sender goes on within half a minute, it would go on undisturbed.
    """

    def forget() -> None:
        with _conntrack() as conntrack:
            for entry in list(_entries(conntrack, zone)):
                if not entry.status & _DST_NAT:
                    _delete(conntrack, entry, zone)

    try:
        within(netns, forget)
    except OSError as error:
        raise DatapathError(
            f"netns {netns}: conntrack does not forget what it tracks: {error}; load the kernel's "
            "module nf_conntrack_netlink"
        ) from None


def _conntrack() -> socket.socket:
    conntrack = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    conntrack.settimeout(_SECONDS)
    return conntrack


def _entries(conntrack: socket.socket, zone: int) -> Iterator[_Entry]:
    in_zone = _zone(zone)
    for family in (socket.AF_INET, socket.AF_INET6):
        conntrack.send(_message(_GET, _NLM_F_DUMP, family))
        for message in _answers(conntrack):
            # Most are not, and need not be taken apart.
            if in_zone not in message:
                continue
            parts = dict(_attributes(message[4:]))
            if parts.get(_ZONE) == in_zone[4:6]:
                (status,) = struct.unpack("!I", parts[_STATUS])
                yield _Entry(family, parts[_TUPLE_ORIG], status)


def _delete(conntrack: socket.socket, entry: _Entry, zone: int) -> None:
    which = _attribute(_TUPLE_ORIG | _NLA_NESTED, entry.original) + _zone(zone)
    conntrack.send(_message(_DELETE, _NLM_F_ACK, entry.family, which))
    try:
        for _ in _answers(conntrack):
            pass
    except OSError as error:
        if error.errno != errno.ENOENT:  # it has ended by itself
            raise


def _zone(number: int) -> bytes:
    return _attribute(_ZONE, struct.pack("!H", number))


def _attribute(kind: int, value: bytes) -> bytes:
    """struct nlattr and its value, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind = struct.unpack_from("=HH", data)
        yield kind & ~_NLA_NESTED, data[4:length]
        data = data[(length + 3) & ~3 :]


def _message(kind: int, flags: int, family: int, attributes: bytes = b"") -> bytes:
    """struct nlmsghdr, then struct nfgenmsg."""
    body = struct.pack("=BBH", family, 0, 0) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST | flags, 0, 0) + body


def _answers(conntrack: socket.socket) -> Iterator[bytes]:
    """Yield what follows the headers, up to the end of a dump or an acknowledgement."""
    while True:
        data = conntrack.recv(1 << 16)
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", data, 16)[0]
                if code:
                    raise OSError(code, os.strerror(code))
                return
            yield data[16:length]
            data = data[(length + 3) & ~3 :]
