"""What runs where on each rung, and the way that each case takes through it.

Every rung stands all the time, so that a round can go from one to the next without set-up; what
is not measured sleeps. Pods: a client with its sidecar per steered rung, with a peer pod for the
way through two sidecars and one whose echo server takes the sidecar's port; a client that is not
enrolled for the other rungs; and the far end, never enrolled.
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redirector import machine
from redirector.compare import envoy
from redirector.compare.cases import STEERED, Case, Load, Rung
from redirector.datapath.layout import Counter
from redirector.enrollment import default_enrollment
from redirector.errors import RedirectorError
from redirector.lab import LabPod, Node
from redirector.lab.closing import Closing
from redirector.lab.node import SIDECAR_ID
from redirector.model import Accelerate, Mode

LOAD_SCRIPT = Path(__file__).with_name("load.lua")

#: Nobody has this address; only steering leads on.
SERVICE = "10.96.77.1"
ANSWER_PORT, FORWARD_PORT, BULK_PORT, ECHO_PORT = 80, 81, 82, 83
#: Where the sidecar listens for those who know it (loopback), and where the far end serves.
EXPLICIT = {ANSWER_PORT: 18080, FORWARD_PORT: 18081, BULK_PORT: 18082, ECHO_PORT: 18083}
APP_PORT, SINK_PORT = 8080, 8082
OUTBOUND, INBOUND = 15001, 15006

_MODES: dict[Rung, tuple[Mode, Accelerate]] = {
    Rung.IPTABLES: (Mode.IPTABLES, Accelerate.OFF),
    Rung.EBPF: (Mode.EBPF, Accelerate.OFF),
    Rung.SOCKMAP: (Mode.EBPF, Accelerate.ON),
}
_PORTS = {Load.ECHO: ECHO_PORT, Load.BULK: BULK_PORT}


@dataclass(frozen=True)
class Way:
    """Where a case's load starts, what it connects to, and the pods whose CPU time it costs."""

    client: LabPod
    address: str
    pods: tuple[LabPod, ...]


class Topology(Closing):
    """The pods of the comparison, all their processes on one CPU; a context manager.

    Records and pins are its own, so that pods enrolled on this machine are not touched. Raises
    MachineError when root, LuaJIT, Envoy or what the modes need is missing.
    """

    def __init__(self, rungs: Iterable[Rung], *, cpu: int) -> None:
        machine.require_root()
        self.luajit = machine.find_tool("luajit", "luajit")
        self.envoy = machine.envoy_binary()
        self.cpu = cpu
        self._ways: dict[tuple[Rung, int], Way] = {}
        self._servers: list[tuple[str, subprocess.Popen[Any], Path]] = []
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.close)
            self._node = self._stack.enter_context(Node(prefix="rdrcmp"))
            self._files = Path(tempfile.mkdtemp(prefix=f"{self._node.name}-", dir="/tmp"))
            self._stack.callback(shutil.rmtree, self._files, ignore_errors=True)
            self._files.chmod(0o711)
            self._sockets = self._files / "sockets"
            self._sockets.mkdir()
            os.chown(self._sockets, SIDECAR_ID, SIDECAR_ID)
            pins = machine.ensure_bpffs() / self._node.name
            self._enrollment = default_enrollment(self._files / "records", pins)
            self._stack.callback(self._uninstall)
            self._build([rung for rung in Rung if rung in set(rungs)])
            undo.pop_all()

    def close(self) -> None:
        """Unenroll, kill and remove everything; a second call does nothing."""
        self._stack.close()

    @property
    def name(self) -> str:
        """The name that everything it made begins with."""
        return self._node.name

    def way(self, case: Case, rung: Rung) -> Way:
        """Return the way of a case on a rung that can carry it."""
        port = _PORTS.get(case.load, FORWARD_PORT if case.sidecars == 2 else ANSWER_PORT)
        return self._ways[rung, port]

    def check(self) -> None:
        """Raise RedirectorError when a server has died, with its last words."""
        for name, process, log in self._servers:
            if process.poll() is not None:
                raise RedirectorError(f"{name} ended with code {process.returncode}: {_tail(log)}")

    def require_accelerated(self, way: Way) -> None:
        """Raise RedirectorError when a way of the sockmap rung went by plain TCP after all."""
        for status in self._enrollment.status():
            if status.pod.name == way.client.name and not status.counters[Counter.ACCELERATED]:
                raise RedirectorError(
                    f"pod {status.pod.name} accelerated no connection; see `redirector check`"
                )

    def _uninstall(self) -> None:
        problems = self._enrollment.uninstall()
        if problems:
            raise RedirectorError(f"cleaning up: {'; '.join(problems)}")

    def _build(self, rungs: list[Rung]) -> None:
        far = self._far_end()
        if {Rung.DIRECT, Rung.UNIX, Rung.LOOPBACK} & set(rungs):
            self._plain(far)
        for rung in rungs:
            if rung in STEERED:
                self._steered(rung, far)

    def _pod(self, name: str) -> LabPod:
        pod = self._node.pod(name)
        pod.call(tune)
        return pod

    def _far_end(self) -> LabPod:
        far = self._pod("far")
        for role, port in (
            ("serve-http", APP_PORT),
            ("serve-sink", SINK_PORT),
            ("serve-echo", EXPLICIT[ECHO_PORT]),
        ):
            self._serve(far, role, f"{far.ip}:{port}")
        return far

    def _plain(self, far: LabPod) -> None:
        """The client that is not enrolled, its sidecar known by hand, and a peer likewise."""
        pod, peer = self._pod("plain"), self._peer("plain")
        clusters = _clusters(f"{peer.ip}:{INBOUND}", f"{far.ip}:{SINK_PORT}")
        listeners: list[envoy.Json] = []
        for port, network_filter in _filters().items():
            listeners.append(envoy.listener(f"127.0.0.1:{EXPLICIT[port]}", network_filter))
            listeners.append(envoy.listener(self._unix(port), network_filter))
        self._run_envoy(pod, envoy.bootstrap(listeners, clusters), EXPLICIT[ANSWER_PORT])
        self._serve(pod, "serve-echo", f"127.0.0.1:{EXPLICIT[ECHO_PORT]}", sidecar=True)
        self._serve(pod, "serve-echo", self._unix(ECHO_PORT), sidecar=True)

        def local(port: int) -> tuple[LabPod, ...]:
            return {FORWARD_PORT: (pod, peer), BULK_PORT: (pod, far)}.get(port, (pod,))

        for port, explicit in EXPLICIT.items():
            self._ways[Rung.LOOPBACK, port] = Way(pod, f"127.0.0.1:{explicit}", local(port))
            self._ways[Rung.UNIX, port] = Way(pod, self._unix(port), local(port))
        for port, served in (
            (ANSWER_PORT, APP_PORT),
            (FORWARD_PORT, APP_PORT),
            (BULK_PORT, SINK_PORT),
            (ECHO_PORT, EXPLICIT[ECHO_PORT]),
        ):
            self._ways[Rung.DIRECT, port] = Way(pod, f"{far.ip}:{served}", (pod, far))

    def _steered(self, rung: Rung, far: LabPod) -> None:
        name = rung.value.replace("+", "-")
        pod, peer, echo = self._pod(name), self._peer(name, rung), self._pod(f"{name}-echo")
        self._enroll(pod, rung)
        self._enroll(echo, rung)
        clusters = _clusters(f"{peer.ip}:{APP_PORT}", f"{far.ip}:{SINK_PORT}")
        steered = envoy.steered_listener(f"0.0.0.0:{OUTBOUND}", _filters())
        self._run_envoy(pod, envoy.bootstrap([steered], clusters), OUTBOUND)
        self._serve(echo, "serve-echo", f"0.0.0.0:{OUTBOUND}", sidecar=True)
        for port, client, pods in (
            (ANSWER_PORT, pod, (pod,)),
            (FORWARD_PORT, pod, (pod, peer)),
            (BULK_PORT, pod, (pod, far)),
            (ECHO_PORT, echo, (echo,)),
        ):
            self._ways[rung, port] = Way(client, f"{SERVICE}:{port}", pods)

    def _peer(self, name: str, rung: Rung | None = None) -> LabPod:
        """A pod with an application and the sidecar in front of it; enrolled for `rung`."""
        peer = self._pod(f"{name}-peer")
        if rung is not None:
            self._enroll(peer, rung)
        self._serve(peer, "serve-http", f"0.0.0.0:{APP_PORT}")
        inbound = envoy.listener(f"0.0.0.0:{INBOUND}", envoy.forward("app"))
        config = envoy.bootstrap([inbound], [envoy.cluster("app", f"127.0.0.1:{APP_PORT}")])
        self._run_envoy(peer, config, INBOUND)
        return peer

    def _enroll(self, pod: LabPod, rung: Rung) -> None:
        mode, accelerate = _MODES[rung]
        self._enrollment.enroll(pod.name, pod.netns, pod.cgroup, mode, accelerate)

    def _unix(self, port: int) -> str:
        return str(self._sockets / str(port))

    def _serve(self, pod: LabPod, role: str, where: str, *, sidecar: bool = False) -> None:
        with LOAD_SCRIPT.open() as script:
            self._start(pod, [self.luajit, "-", role, where], where, sidecar=sidecar, stdin=script)

    def _run_envoy(self, pod: LabPod, config: envoy.Json, port: int) -> None:
        argv: list[str | Path] = [self.envoy, "--config-yaml", json.dumps(config)]
        argv += ["--concurrency", "1", "--disable-hot-restart", "-l", "error"]
        self._start(pod, argv, f"127.0.0.1:{port}", sidecar=True)

    def _start(
        self, pod: LabPod, argv: list[str | Path], where: str, *, sidecar: bool, stdin: Any = None
    ) -> None:
        """Start a server and wait until it accepts at `where`."""
        log = self._files / f"{len(self._servers)}.log"
        with log.open("w") as output:
            process = pod.popen(
                argv, sidecar=sidecar, cpus={self.cpu}, stdin=stdin, stdout=output, stderr=output
            )
        self._servers.append((f"{argv[0]} at {where} in {pod.name}", process, log))
        if not pod.call(_accepts, where, process.pid, uid=0, sidecar=True):
            self.check()
            raise RedirectorError(f"{argv[0]} does not accept connections at {where}: {_tail(log)}")


def _filters() -> dict[int, envoy.Json]:
    return {
        ANSWER_PORT: envoy.answer(),
        FORWARD_PORT: envoy.forward("peer"),
        BULK_PORT: envoy.proxy_bytes("sink"),
    }


def _clusters(peer: str, sink: str) -> list[envoy.Json]:
    return [envoy.cluster("peer", peer), envoy.cluster("sink", sink)]


def tune() -> None:
    """Room for thousands of connections a second, in the pod's own namespace.

    Without it a client runs out of local ports, and conntrack out of entries, for those that are
    closed already; that would be measured instead. Servers' ports lie in that room: a client that
    was given one would keep its server from listening, and may even connect to itself.
    """
    ipv4 = Path("/proc/sys/net/ipv4")
    reserved = ",".join(map(str, (*EXPLICIT.values(), OUTBOUND, INBOUND)))
    (ipv4 / "ip_local_reserved_ports").write_text(reserved)
    (ipv4 / "ip_local_port_range").write_text("10240 60999")
    (ipv4 / "tcp_tw_reuse").write_text("1")
    conntrack = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait")
    if conntrack.exists():
        conntrack.write_text("2")


def _accepts(where: str, pid: int, timeout: float = 20.0) -> bool:
    """Whether a server accepts at `where` before it ends or the time is over."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            _connect(where).close()
        except OSError:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
            time.sleep(0.01)
        else:
            return True
    return False


def _connect(where: str) -> socket.socket:
    if where.startswith("/"):
        unix = socket.socket(socket.AF_UNIX)
        unix.connect(where)
        return unix
    host, _, port = where.rpartition(":")
    return socket.create_connection((host.replace("0.0.0.0", "127.0.0.1"), int(port)), timeout=1)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
