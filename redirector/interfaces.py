"""Addresses of the calling thread's network namespace (getifaddrs(3), netdevice(7)).

A netlink library would do as well, but importing one costs more than a whole enrolment.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address

from redirector.model import IPAddress

_SIOCSIFADDR, _SIOCDIFADDR = 0x8916, 0x8936  # linux/sockios.h
_LOOPBACK_INDEX = 1


class _IfAddrs(ctypes.Structure):
    """struct ifaddrs."""


_IfAddrs._fields_ = (
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("destination", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
)


def addresses() -> Iterator[tuple[str, IPAddress]]:
    """Interface and address, each interface's own; of a point-to-point link not the peer's.

    In the kernel's order, IPv4 first.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"getifaddrs: {os.strerror(code)}")
    found: list[tuple[str, IPAddress]] = []
    try:
        entry = first
        while entry:
            ip = _ip(entry.contents.address)
            if ip is not None:
                found.append((entry.contents.name.decode(), ip))
            entry = entry.contents.next
    finally:
        libc.freeifaddrs(first)
    return iter(sorted(found, key=lambda pair: pair[1].version))


def _ip(sockaddr: int | None) -> IPAddress | None:
    """The address in a struct sockaddr_in or sockaddr_in6 in memory; None for other families."""
    if not sockaddr:
        return None
    family = ctypes.c_uint16.from_address(sockaddr).value
    if family == socket.AF_INET:
        return ip_address(ctypes.string_at(sockaddr + 4, 4))
    if family == socket.AF_INET6:
        return ip_address(ctypes.string_at(sockaddr + 8, 16))
    return None


def put_on_loopback(ip: IPv6Address) -> None:
    """Give lo an address of its own; one that is there already is no error."""
    with _but(errno.EEXIST):
        _change_loopback(_SIOCSIFADDR, ip)


def take_off_loopback(ip: IPv6Address) -> None:
    """The inverse of `put_on_loopback`."""
    with _but(errno.EADDRNOTAVAIL):
        _change_loopback(_SIOCDIFADDR, ip)


def _change_loopback(request: int, ip: IPv6Address) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as any_socket:
        # struct in6_ifreq
        fcntl.ioctl(any_socket, request, struct.pack("=16sIi", ip.packed, 128, _LOOPBACK_INDEX))


@contextlib.contextmanager
def _but(code: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != code:
            raise
