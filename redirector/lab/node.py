"""The node and its pods.

The bridge lives in a network namespace of the node's own, so that the host's interfaces, routes
and rules are never touched. What a node makes carries its random name and is gone when it closes.
"""

import os
import secrets
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Literal

from pyroute2 import IPRoute, netns

from redirector.errors import InputError, MachineError
from redirector.lab import cgroups
from redirector.lab.closing import Closing
from redirector.lab.enter import Place, call_in
from redirector.machine import cgroup2_mount

NETNS_DIRECTORY = Path("/run/netns")
DEFAULT_SUBNET = IPv4Network("10.77.0.0/24")
SUBNET6 = IPv6Network("fd77::/64")
#: The proxy's user and group, as in model.Steering's defaults.
SIDECAR_ID = 1337
_FIRST_POD = 10
_NO_DAD = 0x02  # IFA_F_NODAD: usable at once

Part = Literal["app", "sidecar"]


class LabPod:
    """A network namespace and two cgroups, `app` and `sidecar`. Made by `Node.pod`."""

    def __init__(
        self, name: str, netns_path: Path, cgroup: Path, ip: IPv4Address, ip6: IPv6Address
    ) -> None:
        self.name = name
        self.netns = netns_path
        self.cgroup = cgroup
        self.app = cgroup / "app"
        self.sidecar = cgroup / "sidecar"
        self.ip = str(ip)
        self.ip6 = str(ip6)
        self._children: list[subprocess.Popen[Any]] = []

    def place(
        self,
        *,
        sidecar: bool = False,
        uid: int | None = None,
        gid: int | None = None,
        cpus: set[int] | None = None,
    ) -> Place:
        """Where a process of this pod runs: the sidecar as 1337:1337, others as root.

        A `uid` alone does not change the group of the part.
        """
        default = SIDECAR_ID if sidecar else 0
        return Place(
            netns=self.netns,
            cgroup=self.sidecar if sidecar else self.app,
            uid=default if uid is None else uid,
            gid=default if gid is None else gid,
            cpus=frozenset(cpus or ()),
        )

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        sidecar: bool = False,
        uid: int | None = None,
        gid: int | None = None,
        cpus: set[int] | None = None,
        **popen_options: Any,
    ) -> "subprocess.Popen[Any]":
        """Start a program in the pod, with subprocess.Popen's options; killed on `Node.close`.

        In a process group of its own, so that a Ctrl-C is for us to handle and not for the pod.
        """
        popen_options.setdefault("process_group", 0)
        place = self.place(sidecar=sidecar, uid=uid, gid=gid, cpus=cpus)
        child = subprocess.Popen(argv, preexec_fn=place.enter, **popen_options)
        self._children.append(child)
        return child

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        sidecar: bool = False,
        uid: int | None = None,
        gid: int | None = None,
        cpus: set[int] | None = None,
        timeout: float = 30,
        **run_options: Any,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program in the pod to its end; output is captured as text unless told otherwise.

        Raises subprocess.TimeoutExpired, and CalledProcessError when `check=True` is given.
        """
        place = self.place(sidecar=sidecar, uid=uid, gid=gid, cpus=cpus)
        if "stdout" not in run_options and "stderr" not in run_options:
            run_options.setdefault("capture_output", True)
        run_options.setdefault("text", True)
        return subprocess.run(argv, preexec_fn=place.enter, timeout=timeout, **run_options)

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        sidecar: bool = False,
        uid: int | None = None,
        gid: int | None = None,
        timeout: float = 30,
    ) -> Any:
        """`function(*args)` in a forked child inside the pod; its result or its exception."""
        place = self.place(sidecar=sidecar, uid=uid, gid=gid)
        return call_in(place, function, *args, timeout=timeout)

    def cpu_usec(self, part: Part | None = None) -> int:
        """CPU time used by a part of the pod, or by all of it, in µs since the pod was made."""
        return cgroups.cpu_usec(self.cgroup / part if part else self.cgroup)

    def reap(self) -> None:
        """Collect the exit codes of the started programs; they must be dead or dying."""
        for child in self._children:
            child.wait(timeout=10)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    stream.close()
        self._children.clear()


class Node(Closing):
    """A bridge and the pods on it; a context manager that leaves nothing, also after an error.

    Pods of one node reach each other by IPv4 and IPv6; nothing leads out of it. Any other
    destination (a ClusterIP) has a route to the bridge, which answers "unreachable".
    """

    def __init__(self, prefix: str = "rdr", subnet: IPv4Network = DEFAULT_SUBNET) -> None:
        if os.geteuid() != 0:
            raise MachineError("pods are made of namespaces and cgroups: run this as root")
        self.name = f"{prefix}-{secrets.token_hex(3)}"
        self.subnet = subnet
        self.pods: dict[str, LabPod] = {}
        self._hosts = 0
        self._stack = ExitStack()
        self.cgroup = cgroup2_mount() / self.name
        with ExitStack() as undo:
            undo.callback(self.close)
            self.cgroup.mkdir()
            self._make_netns(self.name)
            self._make_bridge()
            undo.pop_all()

    def close(self) -> None:
        """Kill what runs in the pods and remove them and the bridge; a second call does nothing."""
        pods = list(self.pods.values())
        self.pods.clear()
        with self._stack.pop_all() as undo:
            for pod in pods:
                undo.callback(pod.reap)
            # Entered last, so unwound first: the processes must be dead before the rest can go.
            undo.callback(cgroups.remove_tree, self.cgroup)

    def pod(self, name: str, ip: str | None = None, cgroup: str | None = None) -> LabPod:
        """A new pod, ready to use; the next free address of the subnet unless `ip` is given.

        `cgroup` is a path below the node's, by default the pod's name.
        """
        if name in self.pods:
            raise InputError(f"pod {name!r} is on node {self.name} already; choose another name")
        address = self._address(ip)
        host = int(address) - int(self.subnet.network_address)
        address6 = SUBNET6[host]
        full_name = f"{self.name}-{name}"
        top = self.cgroup / (cgroup or name)
        for directory in (top / "app", top / "sidecar"):
            directory.mkdir(parents=True)
        path = self._make_netns(full_name)
        self._join(full_name, path, f"pod{host}", address, address6)
        pod = LabPod(full_name, path, top, address, address6)
        self.pods[name] = pod
        return pod

    def _address(self, ip: str | None) -> IPv4Address:
        taken = {pod.ip for pod in self.pods.values()} | {str(self.subnet[1])}
        if ip is None:
            start = _FIRST_POD
            free = (a for a in self.subnet.hosts() if int(a) - int(self.subnet[0]) >= start)
            for address in free:
                if str(address) not in taken:
                    return address
            raise InputError(f"subnet {self.subnet} of node {self.name} has no free address")
        address = IPv4Address(ip)
        if address not in self.subnet or str(address) in taken:
            raise InputError(f"ip {ip}: taken already, or not in {self.subnet}; choose another")
        return address

    def _make_netns(self, name: str) -> Path:
        netns.create(name)
        self._stack.callback(netns.remove, name)
        return NETNS_DIRECTORY / name

    def _make_bridge(self) -> None:
        with IPRoute(netns=self.name) as ipr:
            ipr.link("set", index=1, state="up")
            ipr.link("add", ifname="br0", kind="bridge", br_stp_state=0)
            (bridge,) = ipr.link_lookup(ifname="br0")
            ipr.link("set", index=bridge, state="up")
            self._add_addresses(ipr, bridge, self.subnet[1], SUBNET6[1])
        self._call_in_netns(_forward)

    def _call_in_netns(self, function: Callable[..., Any]) -> None:
        place = Place(NETNS_DIRECTORY / self.name, self.cgroup)
        call_in(place, function, timeout=10)

    def _join(self, name: str, path: Path, port: str, ip: IPv4Address, ip6: IPv6Address) -> None:
        with path.open() as target, IPRoute(netns=self.name) as ipr:
            peer = {"ifname": "eth0", "net_ns_fd": target.fileno()}
            ipr.link("add", ifname=port, kind="veth", peer=peer)
            (index,) = ipr.link_lookup(ifname=port)
            (bridge,) = ipr.link_lookup(ifname="br0")
            ipr.link("set", index=index, master=bridge, state="up")
        with IPRoute(netns=name) as ipr:
            ipr.link("set", index=1, state="up")
            (index,) = ipr.link_lookup(ifname="eth0")
            ipr.link("set", index=index, state="up")
            self._add_addresses(ipr, index, ip, ip6)
            ipr.route("add", dst="0.0.0.0/0", gateway=str(self.subnet[1]))
            ipr.route("add", dst="::/0", gateway=str(SUBNET6[1]))

    def _add_addresses(self, ipr: Any, index: int, ip: IPv4Address, ip6: IPv6Address) -> None:
        ipr.addr("add", index=index, address=str(ip), prefixlen=self.subnet.prefixlen)
        ipr.addr("add", index=index, address=str(ip6), prefixlen=SUBNET6.prefixlen, flags=_NO_DAD)


def _forward() -> None:
    """A router without a way out answers "unreachable" at once; a mere host would stay silent."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
