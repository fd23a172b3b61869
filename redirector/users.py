"""Whose ids a pod's users have: those of the user namespace that owns its network namespace.

A pod may have one of its own (`hostUsers: false`); its sidecar's 1337 is another number to the
kernel then. xt_owner takes the ids of a rule so, too, and no rule from outside of that namespace
(owner_check, net/netfilter/xt_owner.c).
"""

import contextlib
import ctypes
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from redirector.errors import MachineError
from redirector.model import IdRange, Ids
from redirector.network import opened

_NS_GET_USERNS = 0xB701  # _IO(0xb7, 0x1), ioctl_ns(2)
_CLONE_NEWUSER = 0x10000000


def ids(netns: Path) -> Ids:
    """Return which ids of the kernel's the pod's are. MachineError when the kernel does not say."""
    with owner(netns) as fd:
        return Ids() if fd is None else _ids_in(fd, netns)


@contextlib.contextmanager
def owner(netns: Path) -> Iterator[int | None]:
    """The user namespace that owns a network namespace, as a descriptor; None when it is ours."""
    with opened(netns) as fd:
        try:
            owning = fcntl.ioctl(fd, _NS_GET_USERNS)
        except PermissionError:  # it is above ours, where our ids are as good as any
            yield None
            return
    try:
        ours = os.path.samestat(os.fstat(owning), os.stat("/proc/self/ns/user"))
        yield None if ours else owning
    finally:
        os.close(owning)


def _ids_in(namespace: int, netns: Path) -> Ids:
    # A namespace shows its maps through a process in it only, and a thread cannot enter one.
    libc = ctypes.CDLL(None, use_errno=True)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            if libc.setns(namespace, _CLONE_NEWUSER) == 0:
                os.write(writer, b"in")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        if os.read(reader, 2) != b"in":
            raise MachineError(
                f"netns {netns}: cannot enter the user namespace that owns it; run this as root"
            )
        users, groups = (_ranges(Path(f"/proc/{pid}/{kind}_map")) for kind in ("uid", "gid"))
        return Ids(users, groups)
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _ranges(path: Path) -> tuple[IdRange, ...]:
    lines = (line.split() for line in path.read_text().splitlines())
    return tuple((int(inside), int(outside), int(count)) for inside, outside, count in lines)
