"""What we need of another process's network namespace. The caller's own is never left.

Each call works in a thread of its own that enters the namespace and ends there: namespaces belong
to threads (setns(2)), so nothing has to be put back, also after an error.
"""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from ipaddress import IPv6Address
from pathlib import Path
from typing import TypeVar

from redirector import interfaces, tcp_diag
from redirector.errors import InputError, MachineError
from redirector.model import IPAddress, Pod
from redirector.steering import PASSTHROUGH_SOURCES

T = TypeVar("T")

_NS_GET_NSTYPE = 0xB703  # _IO(0xb7, 0x3), ioctl_ns(2)
_CLONE_NEWNET = 0x40000000
_SO_NETNS_COOKIE = 71  # Linux 5.14; Python has no name for it


def require_netns(path: Path) -> None:
    """Raise InputError unless `path` is a network namespace (a file of nsfs)."""
    with opened(path):
        pass


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of the network namespace at `path`. InputError when it is none."""
    fd = _open(path)
    try:
        yield fd
    finally:
        os.close(fd)


def addresses(netns: Path) -> tuple[IPAddress, ...]:
    """Return the addresses of the namespace's interfaces, each once, loopback left out.

    Left out too is ::6, which enrolment puts on lo for the sidecar to connect from. Link-local ones
    are the last; IPv4 comes first, what lo has been given comes after what others have, and else
    it is the kernel's order.
    """
    return within(netns, _addresses)


def netns_cookie(netns: Path) -> int:
    """Return the number that bpf_get_netns_cookie() gives for this namespace.

    MachineError on kernels that do not tell it (before 5.14).
    """
    return within(netns, own_netns_cookie)


def open_connections(netns: Path, ports: Collection[int]) -> frozenset[tuple[IPAddress, int]]:
    """Return the local address and port of every TCP connection open on one of these local ports.

    Port 0 stands for all of them.
    An IPv4-mapped address counts as IPv4. Asked of sock_diag(7), where the kernel filters: after a
    rush of connections /proc/net/tcp takes seconds to print those in TIME_WAIT. MachineError on a
    kernel without it.
    """
    return within(netns, lambda: frozenset(tcp_diag.open_connections(ports)))


def open_ends(netns: Path) -> frozenset[tcp_diag.Ends]:
    """Return both ends of every TCP connection that is open in the namespace."""
    return within(netns, lambda: frozenset(tcp_diag.open_ends()))


def listening_inodes(netns: Path, port: int) -> dict[int, int]:
    """Return inode -> address family of every socket that listens on this TCP port."""
    return within(netns, lambda: dict(tcp_diag.listening(port)))


def leaves_by(netns: Path, destination: IPAddress) -> str:
    """Return the interface by which the namespace's routes lead there; empty when none does."""

    def look_up() -> str:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        with IPRoute() as ipr:
            try:
                (route,) = ipr.route("get", dst=str(destination))
            except NetlinkError:
                return ""
            (link,) = ipr.get_links(route.get_attr("RTA_OIF"))
            return str(link.get_attr("IFLA_IFNAME"))

    return within(netns, look_up)


def is_pods(pod: Pod) -> bool:
    """Return whether the pod's path still leads to the namespace that was enrolled.

    InputError when it leads to none.
    """
    return netns_cookie(pod.netns) == pod.netns_cookie


def put_on_loopback(netns: Path, ip: IPv6Address) -> None:
    """Give the namespace's lo an address of its own; one that is there already is no error.

    InputError where lo takes none.
    """
    try:
        within(netns, lambda: interfaces.put_on_loopback(ip))
    except OSError as error:
        raise InputError(
            f"netns {netns}: lo takes no IPv6 address ({error.strerror}), and another interface "
            "has one; set net.ipv6.conf.lo.disable_ipv6 to 0 there, or that of the others to 1"
        ) from None


def take_off_loopback(netns: Path, ip: IPv6Address) -> None:
    """The inverse of `put_on_loopback`, once no open connection has the address."""
    if all(address != ip for address, _ in open_connections(netns, {0})):
        within(netns, lambda: interfaces.take_off_loopback(ip))


def run_in(
    netns: Path,
    argv: Sequence[str],
    stdin: str = "",
    timeout: float = 30,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run a program in the namespace to its end; its output is captured as text.

    It inherits what was made inheritable (`Records.locked`). Raises OSError when it cannot be
    started, subprocess.TimeoutExpired after `timeout` seconds.
    """

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            close_fds=False,
            env={**os.environ, **(environment or {})},
        )

    return within(netns, run)


def within(netns: Path, function: Callable[[], T]) -> T:
    """Return `function()` as called in the namespace; its exception passes through."""
    results: list[T] = []
    errors: list[BaseException] = []

    def enter_and_call() -> None:
        try:
            _enter(fd, netns)
            results.append(function())
        except BaseException as error:
            errors.append(error)

    with opened(netns) as fd:
        thread = threading.Thread(target=enter_and_call, name=f"netns {netns}")
        thread.start()
        thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _open(path: Path) -> int:
    hint = "give a path such as /run/netns/NAME or /proc/PID/ns/net"
    try:
        # A FIFO must not make us wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"netns {path}: {error.strerror}; {hint}") from None
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != _CLONE_NEWNET:
        os.close(fd)
        raise InputError(f"netns {path}: is not a network namespace; {hint}")
    return fd


def _enter(fd: int, path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise MachineError(f"netns {path}: cannot enter: {reason}; run this as root")


def own_netns_cookie() -> int:
    """Return the same for the calling thread's own namespace; this needs no privilege."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            (cookie,) = struct.unpack(
                "=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
            )
        except OSError as error:
            raise MachineError(
                f"the kernel does not tell a namespace's cookie ({error.strerror});"
                " use Linux 5.15 or newer"
            ) from None
    return int(cookie)


def _addresses() -> tuple[IPAddress, ...]:
    found = sorted(
        interfaces.addresses(),
        key=lambda pair: (pair[1].is_link_local, pair[1].version, pair[0] == "lo"),
    )
    return tuple(
        dict.fromkeys(
            address
            for _, address in found
            if not (address.is_loopback or address in PASSTHROUGH_SOURCES)
        )
    )
