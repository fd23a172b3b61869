"""The datapath as it stands under bpffs: load it if it is not there, typed access to its maps."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.layout import (
    About,
    Address,
    CidrKey,
    CidrSet,
    CidrValue,
    Counter,
    Counters,
    Defect,
    Flow,
    FlowKey,
    ListenerKey,
    PodEntry,
    PortKey,
    PortSet,
)
from redirector.datapath.libbpf import AttachType
from redirector.datapath.source import SIZES, build_id, translation_unit
from redirector.errors import DatapathError, MachineError
from redirector.machine import kernel_headers
from redirector.model import IPAddress, IPNetwork

#: Hooks of a pod, in the order in which they are attached: who answers before who asks, and the
#: connect hooks last, so that no connection is steered before all of its way stands.
CGROUP_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("getsockopt", AttachType.CGROUP_GETSOCKOPT),
    ("getpeername4", AttachType.CGROUP_INET4_GETPEERNAME),
    ("getpeername6", AttachType.CGROUP_INET6_GETPEERNAME),
    ("sockops", AttachType.CGROUP_SOCK_OPS),
)
INBOUND_HOOK = ("inbound", AttachType.SK_LOOKUP)
CONNECT_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("connect4", AttachType.CGROUP_INET4_CONNECT),
    ("connect6", AttachType.CGROUP_INET6_CONNECT),
)
ALL_HOOKS = (*CGROUP_HOOKS, INBOUND_HOOK, *CONNECT_HOOKS)


@dataclass(frozen=True)
class OpenFlow:
    """One open connection as the kernel keeps it."""

    key: FlowKey
    flow: Flow


class Datapath:
    """Programs and maps pinned under one directory of a bpffs.

    Every method may raise DatapathError, which names what the kernel refused.
    """

    def __init__(self, root: Path, sizes: Mapping[str, int] = SIZES) -> None:
        self.root = root
        self._sizes = sizes

    # -- as a whole

    def is_loaded(self) -> bool:
        """Whether programs and maps are pinned."""
        return (self.root / "programs").is_dir()

    def ensure(self) -> None:
        """Load the shipped programs unless they are pinned already."""
        if self.is_loaded() and self.is_current():
            return
        with self._alone() as lock:
            if self.is_loaded() and not self.is_current():
                if self.pods():
                    raise DatapathError(
                        f"{self.root}: another version of the programs is in use by "
                        f"{len(self.pods())} pods; move to this one: redirector uninstall, then "
                        "enroll the pods again"
                    )
                self._forget_all()
            if not self.is_loaded():
                self._load(lock)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """Keep other loads and unloads out until leaving.

        A loader inherits the descriptor: it keeps them out also when whoever started it was killed.
        """
        fd = os.open(self.root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def is_current(self) -> bool:
        """Whether what is pinned was compiled from the shipped source with the same constants."""
        return bytes(self._about().sha256) == build_id(translation_unit(self._sizes))

    def defects(self) -> Defect:
        """What the running kernel does wrong with redirected bytes."""
        return Defect(self._about().defects)

    def _about(self) -> About:
        with self._map("about") as fd:
            raw = libbpf.map_lookup(fd, bytes(4), ctypes.sizeof(About))
        if raw is None:
            raise DatapathError(f"{self.root}/maps/about: is empty; use: redirector uninstall")
        return About.from_buffer_copy(raw)

    def _load(self, lock: int) -> None:
        environment = {**os.environ, "BCC_KERNEL_SOURCE": str(kernel_headers())}
        loader = [sys.executable, "-m", "redirector.datapath.loader"]
        command = [*loader, str(self.root), json.dumps(dict(self._sizes))]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, pass_fds=(lock,)
        )
        if done.returncode == 0:
            return
        if "No module named 'bcc'" in done.stderr:
            raise MachineError(
                f"{sys.executable} has no bcc; use Debian's Python with python3-bpfcc: "
                "/usr/bin/python3 -m venv --system-site-packages"
            )
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower()] or lines[-1:]
        raise DatapathError(
            f"the kernel or compiler refused the programs: {'; '.join(told[-3:])}; "
            "see: redirector check"
        )

    def unload(self) -> None:
        """Forget every pin: links detach, programs and maps go with their last user.

        Open sockets of the sockhash are such users: each holds the verdict program, and that the
        map. So nothing that is queued for them is lost; what they hold goes when they close.
        """
        with self._alone():
            self._forget_all()

    def _forget_all(self) -> None:
        for pod in self.pods():
            self.forget(pod)
        shutil.rmtree(self.root, ignore_errors=True)
        for left in self.root.parent.glob(f"{self.root.name}-loading-*"):
            shutil.rmtree(left, ignore_errors=True)

    # -- links

    def pods(self) -> list[str]:
        """Pin directories of pods that have links."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(p.name for p in (self.root / "pods").iterdir())
        return []

    def attach(self, pod: str, hook: str, kind: AttachType, target: Path) -> None:
        """Attach a program to a cgroup or netns by a pinned link; one that holds is left alone."""
        pin = self._pin(pod, hook)
        if self.holds(pod, hook, target):
            return
        self.detach(pod, hook)
        pin.parent.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with libbpf.opened(self.root / "programs" / hook) as program:
                link = libbpf.link_create(program, fd, kind)
            try:
                libbpf.obj_pin(link, pin)
            finally:
                os.close(link)
        except OSError as error:
            raise DatapathError(f"pod {pod}: {hook} on {target}: {error.strerror}") from error
        finally:
            os.close(fd)

    def holds(self, pod: str, hook: str, target: Path) -> bool:
        """Whether the pod's pinned link is attached to this very cgroup or netns."""
        try:
            with libbpf.opened(self._pin(pod, hook)) as fd:
                return libbpf.link_target(fd) == target.stat().st_ino
        except OSError:
            return False

    def detach(self, pod: str, hook: str) -> None:
        """Detach a link and unpin it: when this returns, the program runs no more."""
        pin = self._pin(pod, hook)
        try:
            with libbpf.opened(pin) as link:
                libbpf.link_detach(link)
                pin.unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            raise DatapathError(f"pod {pod}: {hook}: {error.strerror}") from error

    def forget(self, pod: str) -> None:
        """Remove the pod's pin directory and whatever links are left in it."""
        for hook, _ in reversed(ALL_HOOKS):
            self.detach(pod, hook)
        shutil.rmtree(self.root / "pods" / pod, ignore_errors=True)

    def _pin(self, pod: str, hook: str) -> Path:
        return self.root / "pods" / pod / hook

    # -- maps

    @contextlib.contextmanager
    def _map(self, name: str) -> Iterator[int]:
        try:
            with libbpf.opened(self.root / "maps" / name) as fd:
                yield fd
        except OSError as error:
            full = "; the map is full" if error.errno == errno.E2BIG else ""
            raise DatapathError(f"map {name}: {error.strerror or error}{full}") from error

    def put_pod(self, netns: int, entry: PodEntry) -> None:
        """Publish a pod's steering; from here on the programs act on its namespace."""
        cpus = libbpf.possible_cpus()
        with self._map("counters") as fd:
            if libbpf.map_lookup(fd, _key(netns), ctypes.sizeof(Counters) * cpus) is None:
                libbpf.map_update(fd, _key(netns), bytes(ctypes.sizeof(Counters) * cpus))
        with self._map("pods") as fd:
            libbpf.map_update(fd, _key(netns), bytes(entry))

    def delete_pod(self, netns: int) -> None:
        """Forget the pod's steering, lists, addresses, counters and open flows."""
        for name in ("pods", "counters"):
            with self._map(name) as fd:
                libbpf.map_delete(fd, _key(netns))
        with self._map("listeners") as fd:
            for family in (socket.AF_INET, socket.AF_INET6):
                libbpf.map_delete(fd, bytes(ListenerKey(netns=netns, family=family)))
        self.put_addresses(netns, ())
        self.put_cidrs(netns, {})
        self.put_ports(netns, {})
        with self._map("flows") as fd:
            for found in self.flows():
                if netns in (found.flow.client_netns, found.key.netns):
                    libbpf.map_delete(fd, bytes(found.key))

    def put_addresses(self, netns: int, addresses: tuple[IPAddress, ...]) -> None:
        """Make these the pod's own addresses, and no others."""
        wanted = {bytes(Address.of(ip)) for ip in addresses}
        with self._map("pods_by_address") as fd:
            for key in libbpf.map_keys(fd, ctypes.sizeof(Address)):
                if key not in wanted and libbpf.map_lookup(fd, key, 8) == _key(netns):
                    libbpf.map_delete(fd, key)
            for key in wanted:
                libbpf.map_update(fd, key, _key(netns))

    def put_cidrs(self, netns: int, lists: dict[CidrSet, tuple[IPNetwork, ...]]) -> None:
        """Make these the pod's CIDR lists, and no others."""
        wanted = {
            bytes(_cidr_key(netns, which, network)): (
                CidrValue.IN_LOOPBACK if network.is_loopback else CidrValue.LISTED
            )
            for which, networks in lists.items()
            for network in networks
        }
        with self._map("cidrs") as fd:
            for key in libbpf.map_keys(fd, ctypes.sizeof(CidrKey)):
                if key not in wanted and key[4:12] == _key(netns):
                    libbpf.map_delete(fd, key)
            for key, value in wanted.items():
                libbpf.map_update(fd, key, bytes([value]))

    def put_ports(self, netns: int, lists: dict[PortSet, frozenset[int]]) -> None:
        """Make these the pod's port lists, and no others."""
        wanted = {
            bytes(PortKey(netns=netns, port=port, set=which))
            for which, ports in lists.items()
            for port in ports
        }
        with self._map("ports") as fd:
            for key in libbpf.map_keys(fd, ctypes.sizeof(PortKey)):
                if key not in wanted and key[:8] == _key(netns):
                    libbpf.map_delete(fd, key)
            for key in wanted:
                libbpf.map_update(fd, key, b"\1")

    def put_listener(self, netns: int, family: int, listener: int) -> None:
        """Make a listening socket's descriptor the pod's inbound listener of its family."""
        with self._map("listeners") as fd:
            key = bytes(ListenerKey(netns=netns, family=family))
            libbpf.map_update(fd, key, listener.to_bytes(4, "little"))

    def has_pod(self, netns: int) -> bool:
        """Whether the programs act on this namespace."""
        with self._map("pods") as fd:
            return libbpf.map_lookup(fd, _key(netns), ctypes.sizeof(PodEntry)) is not None

    def counters(self, netns: int) -> dict[Counter, int]:
        """A pod's counters, all CPUs together, the open flows' redirected bytes included."""
        size = ctypes.sizeof(Counters)
        totals = dict.fromkeys(Counter, 0)
        with self._map("counters") as fd:
            raw = libbpf.map_lookup(fd, _key(netns), size * libbpf.possible_cpus())
        if raw is None:
            return totals
        for start in range(0, len(raw), size):
            values = Counters.from_buffer_copy(raw, start).value
            for counter in Counter:
                totals[counter] += values[counter]
        for found in self.flows():
            if found.flow.client_netns == netns:
                totals[Counter.REDIRECTED_BYTES] += sum(found.flow.bytes)
                totals[Counter.REDIRECTED_MESSAGES] += sum(found.flow.messages)
        return totals

    def flows(self) -> list[OpenFlow]:
        """The open connections that pods' processes opened and that are steered or accelerated."""
        found: list[OpenFlow] = []
        with self._map("flows") as fd:
            for key in libbpf.map_keys(fd, ctypes.sizeof(FlowKey)):
                value = libbpf.map_lookup(fd, key, ctypes.sizeof(Flow))
                if value is not None:
                    flow = Flow.from_buffer_copy(value)
                    found.append(OpenFlow(FlowKey.from_buffer_copy(key), flow))
        return found


def _key(netns: int) -> bytes:
    return netns.to_bytes(8, "little")


def _cidr_key(netns: int, which: CidrSet, network: IPNetwork) -> CidrKey:
    family_bits = 128 - network.max_prefixlen
    return CidrKey(
        prefixlen=96 + family_bits + network.prefixlen,
        netns_low=netns & 0xFFFFFFFF,
        netns_high=netns >> 32,
        set=which,
        ip=Address.of(network.network_address),
    )
