"""Where on this node a pod is: its cgroup by its UID, its network namespace by its processes.

The kubelet names a pod's cgroup after its UID, in a tree that depends on the cgroup driver, on the
pod's class and on how the node is set up (pkg/kubelet/cm):

    kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid, '-' as '_'>.slice
    kubepods/besteffort/pod<uid>

No runtime is asked. A path through a process ends with that process, so a pod's place is looked for
anew whenever it matters; keeping the namespace by a mount of our own would outlive the pod.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from redirector import network
from redirector.errors import RedirectorError
from redirector.kubernetes.objects import PodObject
from redirector.model import IPAddress, Pod
from redirector.processes import inode_of, netns_of, processes, way_into

_TREE = re.compile(r"kube.*|burstable|besteffort|.*-(burstable|besteffort)\.slice")
_POD = re.compile(r"(?:.*-)?pod([0-9a-fA-F_-]+)(?:\.slice)?")


@dataclass(frozen=True)
class Place:
    """A pod's cgroup, and its network namespace as a path through one of its processes."""

    cgroup: Path
    netns: Path
    netns_cookie: int


@dataclass(frozen=True)
class _Guide:
    """The process that a place was found by, and what was known of the pod then."""

    pid: int
    started: int
    inode: int
    addresses: tuple[IPAddress, ...]
    place: Place


class Places:
    """The node's pods. `cgroups` is the cgroup2 mount; `proc` must show the node's processes."""

    def __init__(self, cgroups: Path, proc: Path = Path("/proc")) -> None:
        self.cgroups = cgroups
        self._proc = proc
        self._known: dict[str, Path] = {}
        self._guides: dict[str, _Guide] = {}

    def cgroup(self, uid: str) -> Path | None:
        """The directory of a pod's cgroup; None while it has none."""
        uid = _normal(uid)
        known = self._known.get(uid)
        if known is None or not known.is_dir():
            self._known = dict(_pods(self.cgroups))
            known = self._known.get(uid)
        return known

    def find(self, pod: PodObject) -> Place | None:
        """The pod's place; None until its first process runs in a namespace of its own.

        Cheap while the process lives that it was found by.
        """
        guide = self._guides.get(pod.kubelet_uid)
        if guide is not None and guide.addresses == pod.addresses and self._lives(guide):
            return guide.place
        cgroup = self.cgroup(pod.kubelet_uid)
        guide = None if cgroup is None else self._guide(cgroup, pod.addresses)
        if guide is None:
            self._guides.pop(pod.kubelet_uid, None)
            return None
        self._guides[pod.kubelet_uid] = guide
        return guide.place

    def forget(self) -> None:
        """Look for every pod anew from now on."""
        self._guides.clear()

    def again(self, record: Pod) -> Path:
        """Another path to an enrolled pod's namespace, should the process of its own have ended."""
        return way_into(record, self._proc)

    def _guide(self, cgroup: Path, addresses: tuple[IPAddress, ...]) -> _Guide | None:
        # The oldest process is the sandbox's own, or of its first container; a container may make
        # namespaces of its own, and a process that entered the node's is nobody's guide.
        found: dict[int, tuple[int, int]] = {}
        node = {inode_of(Path("/proc/self/ns/net")), inode_of(self._proc / "1/ns/net")}
        for started, pid in sorted((self._started(pid), pid) for pid in processes(cgroup)):
            inode = inode_of(self._path(pid))
            if inode is not None and inode not in node:
                found.setdefault(inode, (pid, started))
        several = len(found) > 1 and addresses
        fitting = [inode for inode in found if several and self._has(found[inode][0], addresses)]
        for inode in (*fitting, *found):
            pid, started = found[inode]
            try:
                cookie = network.netns_cookie(self._path(pid))
            except RedirectorError:  # the process has ended meanwhile
                continue
            return _Guide(pid, started, inode, addresses, Place(cgroup, self._path(pid), cookie))
        return None

    def _lives(self, guide: _Guide) -> bool:
        return (
            self._started(guide.pid) == guide.started
            and inode_of(self._path(guide.pid)) == guide.inode
        )

    def _path(self, pid: int) -> Path:
        return netns_of(pid, self._proc)

    def _has(self, pid: int, addresses: tuple[IPAddress, ...]) -> bool:
        try:
            return not set(addresses).isdisjoint(network.addresses(self._path(pid)))
        except RedirectorError:  # its process ended meanwhile
            return False

    def _started(self, pid: int) -> int:
        """When a process began, in clock ticks (proc_pid_stat(5), field 22); last when it ended."""
        try:
            stat = (self._proc / str(pid) / "stat").read_text()
            return int(stat.rpartition(")")[2].split()[19])
        except (OSError, IndexError, ValueError):
            return 1 << 63


def populated(cgroup: Path) -> bool:
    """Whether any process is left in a cgroup or below it (cgroup.events)."""
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except OSError:
        return False


def _pods(directory: Path) -> Iterator[tuple[str, Path]]:
    """UID and cgroup of every pod below; what is not the kubelet's is not entered."""
    try:
        entries = [entry for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for entry in entries:
        pod = _POD.fullmatch(entry.name)
        if pod:
            yield _normal(pod[1]), Path(entry.path)
        elif _TREE.fullmatch(entry.name):
            yield from _pods(Path(entry.path))


def _normal(uid: str) -> str:
    return uid.replace("_", "-").lower()
