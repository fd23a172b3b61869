"""Finds a listening socket that another process already has: a sidecar older than its enrolment.

Sockets that begin to listen later are found by bpf/sockops/sockops.c.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

_SYS_PIDFD_GETFD = 438  # asm-generic/unistd.h, the same on every architecture
_TCP_LISTEN = "0A"


@contextlib.contextmanager
def listening_socket(cgroup: Path, port: int) -> Iterator[int | None]:
    """A duplicate of the descriptor on which a process of `cgroup` listens on TCP `port`.

    None when nobody does. Closed on leaving.
    """
    fd = _find(cgroup, port)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _find(cgroup: Path, port: int) -> int | None:
    for procs in sorted(cgroup.rglob("cgroup.procs")):
        for pid in map(int, procs.read_text().split()):
            # A process may end while we look at it.
            with contextlib.suppress(OSError):
                descriptor = _descriptor(pid, port)
                if descriptor is not None:
                    return _duplicate(pid, descriptor)
    return None


def _descriptor(pid: int, port: int) -> int | None:
    inodes = set(_listening_inodes(pid, port))
    if not inodes:
        return None
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
            if found and found[1] in inodes:
                return int(entry.name)
    return None


def _listening_inodes(pid: int, port: int) -> Iterator[str]:
    """Inodes of the sockets that listen on `port` in the process's namespace (proc(5))."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                local_port = int(fields[1].rpartition(":")[2], 16)
                if fields[3] == _TCP_LISTEN and local_port == port:
                    yield fields[9]


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
