"""Finds listening sockets that another process already has: a sidecar older than its enrolment.

Sockets that begin to listen later are found by bpf/sockops/sockops.c.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

from redirector.network import listening_inodes
from redirector.processes import processes

_SYS_PIDFD_GETFD = 438  # asm-generic/unistd.h, the same on every architecture


@contextlib.contextmanager
def listening_sockets(netns: Path, cgroup: Path, port: int) -> Iterator[list[tuple[int, int]]]:
    """Address family and duplicated descriptor of what listens on TCP `port` of the namespace.

    Of processes of `cgroup` only; at most one of each process and family, as workers that share
    the port (SO_REUSEPORT) stand for each other. Closed on leaving.
    """
    families = listening_inodes(netns, port)
    found: list[tuple[int, int]] = []
    with contextlib.ExitStack() as opened:
        for pid in processes(cgroup) if families else ():
            # A process may end while we look at it.
            with contextlib.suppress(OSError):
                listens = {families[i]: (i, fd) for i, fd in _descriptors(pid) if i in families}
                for family, (inode, descriptor) in listens.items():
                    duplicate = _duplicate(pid, descriptor)
                    opened.callback(os.close, duplicate)
                    found.append((family, duplicate))
                    del families[inode]  # another process may have the same socket
        yield found


def _descriptors(pid: int) -> Iterator[tuple[int, int]]:
    """Inode and number of each socket's descriptor (proc(5))."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
            if found:
                yield int(found[1]), int(entry.name)


def _duplicate(pid: int, descriptor: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        fd: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, pidfd, descriptor, 0)
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return fd
    finally:
        os.close(pidfd)
