"""Which processes a pod has, and whether they fit what a user says of it."""

import contextlib
import os
from pathlib import Path

from redirector import network
from redirector.errors import InputError, RedirectorError
from redirector.model import Pod

_PROC = Path("/proc")
_NODES_OWN = (Path("/proc/self/ns/net"), Path("/proc/1/ns/net"))


def processes(cgroup: Path) -> list[int]:
    """The pids in a cgroup and below it, by the cgroups' paths."""
    found: list[int] = []
    for procs in sorted(Path(directory) / "cgroup.procs" for directory, _, _ in os.walk(cgroup)):
        try:
            text = procs.read_text()
        except OSError:  # gone meanwhile, or threaded
            continue
        found += map(int, text.split())
    return found


def require_fit(name: str, netns: Path, cgroup: Path) -> None:
    """Raise InputError when a network namespace is the node's own, or the cgroup not of its pod.

    A cgroup without processes fits any namespace: they may be yet to come.
    """
    own = netns.stat().st_ino
    if own in map(inode_of, _NODES_OWN):
        raise InputError(
            f"pod {name}: netns {netns}: is the node's own, not a pod's; give a path such as "
            "/run/netns/NAME or /proc/PID/ns/net of a process of the pod"
        )
    elsewhere = {pid: inode_of(netns_of(pid)) for pid in processes(cgroup)}
    elsewhere = {pid: inode for pid, inode in elsewhere.items() if inode is not None}
    if elsewhere and own not in elsewhere.values():
        pid = min(elsewhere)
        raise InputError(
            f"pod {name}: cgroup {cgroup}: none of its processes (such as {pid}) is in netns "
            f"{netns}; give the cgroup and the namespace of one pod"
        )


def outside(netns: Path, cgroup: Path) -> list[int]:
    """The processes of a network namespace that are not in its pod's cgroup."""
    own, within = netns.stat().st_ino, set(processes(cgroup))
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    return sorted(pid for pid in pids if pid not in within and inode_of(netns_of(pid)) == own)


def way_into(pod: Pod, proc: Path = _PROC) -> Path:
    """Another path to an enrolled pod's namespace, by one of its processes, should its own be gone.

    Its own where no process is there: then the namespace has gone, too.
    """
    seen: set[int | None] = set()
    for pid in processes(pod.cgroup):
        path = netns_of(pid, proc)
        inode = inode_of(path)
        if inode in seen:
            continue
        seen.add(inode)
        with contextlib.suppress(RedirectorError):
            if network.netns_cookie(path) == pod.netns_cookie:
                return path
    return pod.netns


def netns_of(pid: int, proc: Path = _PROC) -> Path:
    """The network namespace of a process. One that has ended and was not waited for has none."""
    return proc / str(pid) / "ns/net"


def inode_of(path: Path) -> int | None:
    """The inode number of a file; None when there is none. A namespace's tells it from others."""
    try:
        return path.stat().st_ino
    except OSError:
        return None
