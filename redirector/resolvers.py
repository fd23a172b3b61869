"""Which resolvers a pod's processes ask: what `dnsCapture` captures when none are named."""

import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, ip_address
from pathlib import Path

from redirector.errors import InputError
from redirector.model import IPAddress, Steering
from redirector.processes import processes
from redirector.steering import as_routed, unmapped

_NAMED_NETNS = Path("/run/netns")
_ETC_NETNS = Path("/etc/netns")
_SYS_OPENAT2 = 437
_RESOLVE_IN_ROOT = 0x10
_MOST_BYTES = 1 << 16


class _OpenHow(ctypes.Structure):
    """struct open_how, linux/openat2.h."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def lacks_resolvers(steering: Steering) -> bool:
    """Whether the pod's own are to be looked for: names are captured, and nobody named any."""
    return steering.dns_capture and steering.dns_servers == ()


def with_resolvers(pod: str, steering: Steering, netns: Path, cgroup: Path) -> Steering:
    """Name the pod's own resolvers where DNS is to be captured and none are named.

    Its processes know them, else `/etc/netns/NAME/resolv.conf` (ip-netns(8)) of a namespace with a
    name. InputError when neither does.
    """
    if not lacks_resolvers(steering):
        return steering
    text = next(_resolv_confs(netns, cgroup), None)
    if text is None:
        raise InputError(
            f"pod {pod}: dnsCapture: the pod's resolvers are not known: no process in {cgroup} has "
            "an /etc/resolv.conf; name them with dnsServers"
        )
    return replace(steering, dns_servers=nameservers(text))


def nameservers(resolv_conf: str) -> tuple[IPAddress, ...]:
    """The addresses of resolv.conf(5)'s nameserver lines, each once; this host if there are none.

    Lines that hold no address are passed over, as resolvers do.
    """
    found: dict[IPAddress, None] = {}
    for line in resolv_conf.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                # A scope (fe80::1%eth0) is no part of the address that the rules compare.
                found[as_routed(unmapped(ip_address(words[1].partition("%")[0])))] = None
            except ValueError:
                continue
    return tuple(found) or (IPv4Address("127.0.0.1"),)


def _resolv_confs(netns: Path, cgroup: Path) -> Iterator[str]:
    for pid in processes(cgroup):
        try:
            yield _read_in_root(Path(f"/proc/{pid}/root"))
        except OSError:
            continue
    if netns.parent == _NAMED_NETNS:
        path = _ETC_NETNS / netns.name / "resolv.conf"
        if path.is_file():
            yield path.read_text(errors="replace")


def _read_in_root(root: Path) -> str:
    """Read /etc/resolv.conf as who has this root: its symbolic links must not lead to our files."""
    how = _OpenHow(os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, 0, _RESOLVE_IN_ROOT)
    directory = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(directory),
            b"/etc/resolv.conf",
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(root))
    finally:
        os.close(directory)
    with os.fdopen(fd, "rb") as file:
        return file.read(_MOST_BYTES).decode(errors="replace")
