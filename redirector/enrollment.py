"""Enrolling pods by hand: the verbs of the CLI, without their words.

The order of steps is what makes a kill at any moment harmless: the record is written before the
kernel is touched and deleted after it is clean, so `unenroll` and `uninstall` find everything.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from redirector import machine, network, routes, users
from redirector.datapath.layout import ConnectKind, Counter, Defect, Room
from redirector.datapath.maps import Counted
from redirector.datapath.pins import Datapath
from redirector.errors import (
    AlreadyEnrolled,
    DatapathError,
    InputError,
    MachineError,
    NotEnrolled,
    RedirectorError,
)
from redirector.model import Accelerate, Ids, IPAddress, Links, Mode, Pod, Steering
from redirector.modes.base import ModeDriver
from redirector.modes.closed import SETTLED_NS, forget_closed
from redirector.modes.ebpf import EbpfMode, pin_name
from redirector.modes.iptables.driver import IptablesMode
from redirector.processes import require_fit, way_into
from redirector.records import Records, name_of
from redirector.status import Latency, MapFill, NodeStatus, PodStatus, Steady
from redirector.steering import PASSTHROUGH_V6

#: Where the records live; below the directory that the xDS server's socket is in.
STATE = Path("/run/redirector/pods")
#: Records and pins are files of this name, with an ending; NAME_MAX is 255.
_LONGEST_NAME = 240
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


class Enrollment:
    """The pods of this node. Needs root; MachineError otherwise."""

    def __init__(
        self,
        records: Records,
        datapath: Datapath,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`tell` hears what fails no command, and that somebody should know."""
        machine.require_root()
        self._records = records
        self._datapath = datapath
        self._ebpf = EbpfMode(datapath, tell)
        self._steady = Steady()
        self._modes: dict[Mode, ModeDriver] = {
            Mode.EBPF: self._ebpf,
            Mode.IPTABLES: IptablesMode(),
        }

    def enroll(
        self,
        name: str,
        netns: Path,
        cgroup: Path,
        mode: Mode,
        accelerate: Accelerate = Accelerate.AUTO,
        steering: Steering | None = None,
        uid: str = "",
    ) -> Pod:
        """Steer a pod's new connections to its sidecar. All or nothing."""
        _require_name(name)
        pod = Pod(
            name=name,
            netns=netns.absolute(),
            cgroup=require_cgroup(cgroup),
            mode=mode,
            accelerate=accelerate,
            steering=steering or Steering(),
            addresses=network.addresses(netns),
            links=_links(name, netns, mode, steering),
            netns_cookie=network.netns_cookie(netns),
            uid=uid,
            ids=_ids(netns, mode),
        )
        require_fit(name, pod.netns, pod.cgroup)
        with self._changing():
            self._require_new(pod)
            self._require_addresses(pod)
            pod = replace(pod, repeated=self._repeated(pod))
            self._records.put(pod)
            try:
                # 127.0.0.6 is loopback by itself, ::6 must be made so.
                if any(ip.version == 6 for ip in pod.node_wide):
                    network.put_on_loopback(netns, PASSTHROUGH_V6)
                self._modes[mode].install(pod)
            except BaseException:
                # What cannot be undone, either, stays recorded; why it began is what matters.
                with contextlib.suppress(RedirectorError):
                    self._remove(pod)
                raise
            self._sweep()
        return pod

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Keep other commands that change pods out, on maps that are all in their place."""
        with self._records.locked():
            self._datapath.mend()
            yield

    def _require_new(self, pod: Pod) -> None:
        for other in self._records.near(pod):
            if other.name == pod.name:
                raise AlreadyEnrolled(
                    f"pod {pod.name}: enrolled already in {other.mode} mode; change it with "
                    f"'redirector mode {pod.name} MODE' or take it off with "
                    f"'redirector unenroll {pod.name}'"
                )
            if other.netns_cookie == pod.netns_cookie:
                raise AlreadyEnrolled(
                    f"pod {pod.name}: netns {pod.netns} is enrolled already as pod {other.name}; "
                    f"take it off with 'redirector unenroll {other.name}'"
                )
            # The programs would run twice for one connection.
            if pod.cgroup.is_relative_to(other.cgroup) or other.cgroup.is_relative_to(pod.cgroup):
                raise AlreadyEnrolled(
                    f"pod {pod.name}: cgroup {pod.cgroup} overlaps {other.cgroup}, which is "
                    f"enrolled as pod {other.name}; give each pod its own, or take that one off "
                    f"with 'redirector unenroll {other.name}'"
                )

    def _require_addresses(self, pod: Pod) -> None:
        """Both ends of a connection know it by their pods' addresses: of two pods, one would lose.

        Not of those that pods have beside the one that they are known by: of a bridge of their own,
        or of a load balancer.
        """
        for other, ips in self._at_addresses_of(pod):
            shared = sorted(str(ip) for ip in ips if ip in pod.aims and ip in other.aims)
            if shared:
                raise AlreadyEnrolled(
                    f"pod {pod.name}: address {', '.join(shared)} is that of pod {other.name}, "
                    "too; use --mode iptables, or take that one off with "
                    f"'redirector unenroll {other.name}'"
                )

    def _repeated(self, pod: Pod) -> tuple[IPAddress, ...]:
        taken = {ip for _, ips in self._at_addresses_of(pod) for ip in ips}
        return tuple(ip for ip in pod.node_wide if ip in taken)

    def _at_addresses_of(self, pod: Pod) -> Iterator[tuple[Pod, set[IPAddress]]]:
        """The other pods in eBPF mode, as they are now, that had some of these addresses first."""
        if pod.mode is not Mode.EBPF:
            return
        for other in self._records.at_addresses(pod):
            if _lost(other):
                continue
            # An address that the other has given up meanwhile is free.
            other = replace(other, addresses=network.addresses(other.netns))
            yield other, set(pod.node_wide).intersection(other.unique)

    def change_mode(self, name: str, mode: Mode) -> Pod:
        """Move a pod to another mode. Both steer for a moment, so no connection slips past.

        To the mode it has: repair what is missing. Either way its addresses are read anew.
        """
        return self.update(name, mode=mode)

    def update(
        self,
        name: str,
        *,
        mode: Mode | None = None,
        accelerate: Accelerate | None = None,
        steering: Steering | None = None,
        netns: Path | None = None,
    ) -> Pod:
        """Give an enrolled pod other options; None keeps what it has, and repairs what is missing.

        `netns` is another path of the same namespace. The pod stays steered all the time, by the
        old options or the new.
        """
        with self._changing():
            old = self.get(name)
            new = replace(
                old,
                netns=(netns or old.netns).absolute(),
                mode=mode or old.mode,
                accelerate=accelerate or old.accelerate,
                steering=steering or old.steering,
            )
            lost = _lost(new)
            if lost:
                raise InputError(
                    f"pod {name}: {lost}; take the pod off with 'redirector unenroll {name}' and "
                    "enroll it again"
                )
            new = replace(
                new,
                addresses=network.addresses(new.netns),
                links=_links(name, new.netns, new.mode, new.steering),
                ids=_ids(new.netns, new.mode),
            )
            if new.mode is not old.mode:
                self._require_addresses(new)
            new = replace(new, repeated=self._repeated(new))
            had = self._records.had(name)
            self._records.put(old, changing=(*had, new))
            self._modes[new.mode].install(new, had)
            self._records.put(new, changing=had)
            for other in self._modes.values():
                if other.mode is not new.mode:
                    other.remove(new, had)
            self._records.put(new)
            self._sweep()
        return new

    def take_over(self) -> tuple[list[Pod], list[str]]:
        """Put every pod on this version's programs and rules, and repair what is missing.

        Pods that are whole already are left alone. Answers those that were not, and what could not
        be done, a line each. Open connections stay with the programs that they began with.
        """
        self.sweep()
        taken: list[Pod] = []
        readable, damaged = self._records.sorted_out()
        problems = list(damaged.values())
        for pod in readable:
            try:
                if self.missing(pod):
                    taken.append(self.update(pod.name))
            except NotEnrolled:
                continue
            except RedirectorError as error:
                problems.append(str(error))
        self.sweep()
        return taken, problems

    def sweep(self) -> None:
        """Let go of what older versions' connections no longer need; every verb does so, too."""
        with self._changing():
            self._sweep()

    def forget_closed(self, settled_ns: int = SETTLED_NS) -> int:
        """Delete flows whose close somebody else's program kept from us; return how many."""
        if not self._datapath.is_loaded():
            return 0
        with self._changing():
            pods = [pod for pod in self.readable() if pod.mode is Mode.EBPF]
            return forget_closed(self._datapath.maps, pods, settled_ns)

    def _sweep(self) -> None:
        if self._datapath.others():
            self._ebpf.sweep(self._records.readable())

    def draining(self) -> int:
        """How many older versions' maps open connections still need."""
        return len(self._datapath.others())

    def unenroll(self, name: str) -> None:
        """Make a pod's new connections direct; open ones go on.

        Of a pod whose record is damaged: as far as its name and what is left of the record tell.
        """
        with self._changing():
            try:
                pod = self.get(name)
            except DatapathError as error:
                self._remove_damaged(name, error)
            else:
                self._remove(pod)
            self._sweep()

    def _remove(self, pod: Pod) -> None:
        # A namespace lives without its name while a process is in it, and what we put there, too.
        if _lost(pod):
            pod = replace(pod, netns=way_into(pod))
        # Of every mode: a change of mode may have been interrupted.
        had = self._records.had(pod.name)
        for driver in self._modes.values():
            driver.remove(pod, had)
        _restore_loopback(pod)
        self._records.delete(pod.name)

    def get(self, name: str) -> Pod:
        """The record of one pod. NotEnrolled names those that are."""
        pod = self._records.get(name)
        if pod is None:
            known = ", ".join(self._records.names()) or "none"
            raise NotEnrolled(f"pod {name}: is not enrolled; enrolled are: {known}")
        return pod

    @property
    def datapath(self) -> Datapath:
        """The programs and maps that pods in eBPF mode share."""
        return self._datapath

    def version(self) -> int:
        """Another number whenever a pod's record has changed."""
        return self._records.version()

    def pods(self) -> list[Pod]:
        """The records of all enrolled pods, by name."""
        return self._records.all()

    def readable(self) -> list[Pod]:
        """Those of `pods` whose records can be read."""
        return self._records.readable()

    def keep_problems(self, problems: Mapping[str, str]) -> None:
        """Keep what the agent could not do, by pod, for `status` to tell."""
        self._records.keep_problems(problems)

    def missing(self, pod: Pod) -> tuple[str, ...]:
        """Name what a pod of the records lacks, of itself or of ours; () when it is whole."""
        lost = _lost(pod)
        return (lost,) if lost else tuple(self._modes[pod.mode].missing(pod))

    def interrupted(self, pod: Pod) -> bool:
        """Whether a change of a pod was begun and did not end; `update` without options ends it.

        One that another process is making just now looks the same.
        """
        return len(self._records.had(pod.name)) > 1

    def status(self) -> list[PodStatus]:
        """Every enrolled pod, by name."""
        return list(self.node_status(with_maps=False).pods)

    def node_status(self, *, with_maps: bool = True) -> NodeStatus:
        """Every enrolled pod, and the datapath's maps. Its cost grows with pods and open flows."""
        loaded = self._datapath.is_loaded()
        defects = self._datapath.defects() if loaded else Defect(0)
        pods = []
        readable, damaged = self._records.sorted_out()
        counts = self._counts(readable) if loaded else {}
        flows = self._datapath.maps.shares() if loaded else {}
        for pod in readable:
            lost = _lost(pod)
            driver = self._modes[pod.mode]
            missing = (lost,) if lost else tuple(driver.missing(pod))
            counters: dict[Counter, int] = {}
            latencies: dict[ConnectKind, Latency] = {}
            if pod.name in counts:
                counted, counters = counts[pod.name]
                latencies = {
                    kind: Latency(buckets, us / 1e6)
                    for kind, (buckets, us) in counted.latencies().items()
                }
            found = () if lost and pod.mode is Mode.IPTABLES else driver.tallies(pod)
            has = flows.get(pod.netns_cookie) if pod.mode is Mode.EBPF else None
            pods.append(
                PodStatus(pod, missing, counters, defects, lost is None, found, latencies, has)
            )
        fills = self._datapath.maps.fills() if loaded and with_maps else {}
        maps = tuple(MapFill(name, *fill) for name, fill in fills.items())
        followers = self._datapath.followers() if with_maps else None
        following = (followers.sweep(), followers.lost()) if followers else (0, 0)
        problems = self._records.problems() | damaged
        floor = self._datapath.maps.room(Room.FLOOR) if loaded else 0
        return NodeStatus(tuple(pods), maps, defects, problems, *following, floor)

    def _counts(self, pods: Sequence[Pod]) -> dict[str, tuple[Counted, dict[Counter, int]]]:
        """By name, what was counted of each pod in eBPF mode, open flows included."""
        maps = self._datapath.maps
        with self._steady.reading():
            counted = {
                pod.name: maps.counted(pod.netns_cookie) for pod in pods if pod.mode is Mode.EBPF
            }
            # In this order: a flow that closes now is left out rather than told twice.
            moved = maps.moved()
            return {
                pod.name: (
                    counted[pod.name],
                    self._steady.told(
                        pod, counted[pod.name].counters(), moved.get(pod.netns_cookie, (0, 0))
                    ),
                )
                for pod in pods
                if pod.name in counted
            }

    def uninstall(self) -> list[str]:
        """Remove everything this product put into the kernel, and the records. Idempotent.

        Answers what could not be undone, a line each; the rest is removed all the same.
        """
        problems: list[str] = []
        if not self._records.directory.exists() and not self._datapath.root.exists():
            return problems
        with self._records.locked():
            with contextlib.suppress(DatapathError, MachineError):
                self._datapath.mend()
            for path in self._records.paths():
                try:
                    self._uninstall(path)
                except RedirectorError as error:
                    problems.append(str(error))
            self._datapath.unload()
            self._records.clear()
        return problems

    def _uninstall(self, path: Path) -> None:
        try:
            pod = self._records.read(path)
        except DatapathError as error:
            self._remove_damaged(name_of(path), error)
        else:
            self._remove(pod)

    def _remove_damaged(self, name: str, error: DatapathError) -> None:
        guess = self._records.guess(name)
        cookies = [*self._records.cookies(name), *([guess.netns_cookie] if guess else [])]
        self._ebpf.remove_unknown(name, cookies)
        if guess is not None:
            self._modes[Mode.IPTABLES].remove(guess)
            _restore_loopback(guess)
        self._records.delete(name)
        if guess is None:
            raise DatapathError(
                f"{str(error).partition(';')[0]}; if that pod was in iptables mode, its rules "
                "stay: in its namespace, remove the chains REDIRECTOR_* and the sets "
                "redirector-* by hand"
            ) from error


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"pod {name!r}: not a name; use letters, digits, '-', '.', and one '/' "
            "between namespace and pod"
        )
    length = len(pin_name(name))
    if length > _LONGEST_NAME:
        raise InputError(
            f"pod {name!r}: {length} characters, where '.' and '/' count as three; at most "
            f"{_LONGEST_NAME} name a pod"
        )


def _restore_loopback(pod: Pod) -> None:
    with contextlib.suppress(InputError):  # the namespace is gone
        if network.is_pods(pod):
            network.take_off_loopback(pod.netns, PASSTHROUGH_V6)


def _links(name: str, netns: Path, mode: Mode, steering: Steering | None) -> Links:
    if mode is not Mode.EBPF or steering is None:
        return Links()
    return routes.links(name, netns, steering.exclude_interfaces)


def _ids(netns: Path, mode: Mode) -> Ids:
    # iptables mode runs where the kernel translates them.
    return users.ids(netns) if mode is Mode.EBPF else Ids()


def _lost(pod: Pod) -> str | None:
    """What of the pod itself, not of ours, is no longer there."""
    try:
        if not network.is_pods(pod):
            return f"netns {pod.netns}: is another namespace than was enrolled"
    except InputError as error:
        return str(error).partition(";")[0]
    return None if pod.cgroup.is_dir() else f"cgroup {pod.cgroup}: does not exist"


def require_cgroup(path: Path) -> Path:
    """The path of a cgroup2 directory that is not the root. InputError says what it is not."""
    # Dots and links must not hide that it is the root.
    path = path.resolve()
    if (path / "cgroup.events").exists():  # not in the root, nor in version 1
        return path
    if not path.exists():
        problem = "does not exist"
    elif (path / "cgroup.controllers").exists():
        problem = "is the root of all processes"
    else:
        problem = "is not a cgroup2 directory"
    raise InputError(
        f"cgroup {path}: {problem}; give a pod's directory below {machine.cgroup2_mount()}"
    )


def default_enrollment(
    state: Path | None, pins: Path | None, tell: Callable[[str], None] = lambda _: None
) -> Enrollment:
    """The node's own, at the default places unless told otherwise."""
    machine.require_root()
    # What is elsewhere is not ours to remove when everything is uninstalled.
    root = machine.require_bpffs(pins) if pins else machine.ensure_bpffs() / "redirector"
    return Enrollment(Records(state or STATE), Datapath(root), tell)
