"""Finds listening sockets that another process already has: a sidecar older than its enrolment.

Sockets that begin to listen later are found by bpf/sockops/sockops.c.
"""

import contextlib
import ctypes
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

_SYS_PIDFD_GETFD = 438  # asm-generic/unistd.h, the same on every architecture
_TCP_LISTEN = "0A"
_TABLES = (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6))


@contextlib.contextmanager
def listening_sockets(cgroup: Path, port: int) -> Iterator[dict[int, int]]:
    """Address family -> duplicate of a descriptor that listens on TCP `port` in `cgroup`.

    At most one for each family; several that share the port (SO_REUSEPORT) stand for each other.
    Closed on leaving.
    """
    found: dict[int, int] = {}
    with contextlib.ExitStack() as opened:
        for procs in sorted(cgroup.rglob("cgroup.procs")):
            for pid in map(int, procs.read_text().split()):
                # A process may end while we look at it.
                with contextlib.suppress(OSError):
                    for family, descriptor in _descriptors(pid, port):
                        if family not in found:
                            found[family] = _duplicate(pid, descriptor)
                            opened.callback(os.close, found[family])
        yield found


def _descriptors(pid: int, port: int) -> Iterator[tuple[int, int]]:
    inodes = dict(_listening_inodes(pid, port))
    if not inodes:
        return
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
            if found and found[1] in inodes:
                yield inodes[found[1]], int(entry.name)


def _listening_inodes(pid: int, port: int) -> Iterator[tuple[str, int]]:
    """Inode and family of each socket that listens on `port` in the process's namespace (proc(5)).

    A line is: sl local_address:port rem_address st tx:rx tr:when retrnsmt uid timeout inode.
    """
    for table, family in _TABLES:
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                local_port = int(fields[1].rpartition(":")[2], 16)
                if fields[3] == _TCP_LISTEN and local_port == port:
                    yield fields[9], family


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
