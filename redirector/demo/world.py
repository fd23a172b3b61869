"""What the demo stands on: pods, applications, sidecars, the xDS server, the enrollment.

Everything carries the node's random name and is gone when the world closes, also after an error.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from redirector import machine, network
from redirector.bootstrap import bootstrap
from redirector.datapath.pins import Datapath
from redirector.demo import orphans
from redirector.demo.app import Seen, read_seen
from redirector.demo.client import Answer, Request
from redirector.demo.traffic import Traffic
from redirector.enrollment import Enrollment, default_enrollment
from redirector.errors import MachineError, RedirectorError
from redirector.lab import LabPod, Node
from redirector.lab.closing import Closing
from redirector.lab.node import NETNS_DIRECTORY

PREFIX = "rdrdemo"
NAMESPACE = "demo"
APP_PORT, ADMIN_PORT = 8080, 15000
#: The addresses are those of manifests/demo.
CLIENT, WEB_V1, WEB_V2, PLAIN = "client", "web-v1", "web-v2", "plain"
ADDRESSES = {
    CLIENT: "10.77.0.10",
    WEB_V1: "10.77.0.11",
    WEB_V2: "10.77.0.12",
    PLAIN: "10.77.0.13",
}
WEBS = (WEB_V1, WEB_V2)
ENROLLED = (CLIENT, *WEBS)
SERVICE, SERVICE_V1 = "10.96.77.1", "10.96.77.2"

#: How long anything may take to start or to settle, seconds.
PATIENCE = 60.0


@dataclass(frozen=True)
class Child:
    """A program that the demo started, and the file that it writes its words to."""

    name: str
    process: "subprocess.Popen[Any]"
    log: Path

    def words(self, most: int = 3) -> list[str]:
        """The last lines that it wrote."""
        return self.log.read_text(errors="replace").splitlines()[-most:]

    def require(self) -> None:
        """Raise RedirectorError when it has ended."""
        code = self.process.poll()
        if code is not None:
            said = " / ".join(self.words()) or "it said nothing"
            raise RedirectorError(f"{self.name} ended with code {code}: {said}")


class World(Closing):
    """The node of the demo; a context manager that leaves nothing."""

    def __init__(self) -> None:
        machine.require_root()
        self.envoy = machine.envoy_binary()
        self.xds_server = _xds_server()
        self.manifests_source = _manifests()
        self.children: dict[str, Child] = {}
        self._stack = ExitStack()
        #: Earlier demos that were killed and whose remains are gone now.
        self.swept = orphans.sweep(PREFIX)
        with ExitStack() as undo:
            undo.callback(self.close)
            self.node = self._stack.enter_context(Node(prefix=PREFIX))
            self.files = orphans.RUN / self.node.name
            self._stack.callback(shutil.rmtree, self.files, ignore_errors=True)
            self._directory(self.files)
            orphans.claim(self.files)
            self.datapath = Datapath(machine.ensure_bpffs() / self.node.name)
            self.enrollment: Enrollment = default_enrollment(
                self.files / "records", self.datapath.root
            )
            self._stack.callback(self.enrollment.uninstall)
            self._stack.callback(self.stop_children)
            undo.pop_all()

    def close(self) -> None:
        """Stop, unenroll and remove everything; a second call does nothing."""
        self._stack.close()

    @property
    def pods(self) -> dict[str, LabPod]:
        """The pods by their short names."""
        return self.node.pods

    @property
    def socket(self) -> Path:
        """Where the sidecars find the xDS server."""
        return self.files / "xds.sock"

    @property
    def manifests(self) -> Path:
        """The demo's own copy, which it edits."""
        return self.files / "manifests"

    @property
    def events(self) -> Path:
        """Where the xDS server writes a line for each push."""
        return self.files / "events"

    # -- what runs

    def make_pods(self) -> None:
        """The namespaces and cgroups, with nothing running in them."""
        for name, address in ADDRESSES.items():
            self.node.pod(name, address)
        # The bridge says "unreachable" every time it is asked, not once a second.
        limit = Path("/proc/sys/net/ipv4/icmp_ratelimit")
        network.within(NETNS_DIRECTORY / self.node.name, lambda: limit.write_text("0"))

    def start_apps(self) -> None:
        """The web servers, ready to answer."""
        for name in WEBS:
            argv = ["--port", str(APP_PORT), "--name", name, "--seen", str(self._seen(name))]
            self._run_in(name, [*_module("redirector.demo.app"), *argv], sidecar=False)
        for name in WEBS:
            self.wait(partial(self.accepts, name, "127.0.0.1", APP_PORT), f"{name}'s app")

    def start_sidecars(self) -> None:
        """Envoys, ready for their configuration."""
        for name in ENROLLED:
            config = self.files / f"{name}.json"
            config.write_text(json.dumps(self._bootstrap(name), indent=2))
            config.chmod(0o644)
            argv: list[str | Path] = [self.envoy, "-c", config, "--concurrency", "1"]
            argv += ["--disable-hot-restart", "-l", "warning"]
            self._run_in(name, argv, sidecar=True)
        for name in ENROLLED:
            self.wait(partial(self.admin, name, "/server_info"), f"{name}'s Envoy")

    def _bootstrap(self, name: str) -> dict[str, Any]:
        xds = f"unix:{self.socket}"
        return {**bootstrap(name, NAMESPACE, ADDRESSES[name], xds=xds, admin_port=ADMIN_PORT)}

    def start_xds_server(self) -> str:
        """The control plane on a copy of the manifests; the TCP address that it listens on."""
        self._directory(self.manifests)
        for path in self.manifests_source.iterdir():
            shutil.copyfile(path, self.manifests / path.name)
        tcp = f"127.0.0.1:{18000 if _is_free(18000) else 0}"
        argv: list[str | Path] = [self.xds_server, "--manifests", self.manifests]
        argv += ["--listen", tcp, "--listen", f"unix:{self.socket}", "--events", self.events]
        # It runs on the node, not in a pod; in a cgroup, so that what kills the node's ends it too.
        cgroup = machine.cgroup2_mount() / self.node.name / "xds-server"
        cgroup.mkdir()
        log = self.files / "xds-server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                argv,
                preexec_fn=partial((cgroup / "cgroup.procs").write_text, "0"),
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.children["xds-server"] = Child("xds-server", process, log)
        self.wait(self.socket.exists, "xds-server")
        return tcp

    def _run_in(self, pod: str, argv: Sequence[str | Path], *, sidecar: bool) -> None:
        name = f"{pod}'s {'Envoy' if sidecar else 'app'}"
        log = self.files / f"{pod}-{'envoy' if sidecar else 'app'}.log"
        with log.open("w") as output:
            process = self.pods[pod].popen(
                argv,
                sidecar=sidecar,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.children[name] = Child(name, process, log)

    def stop_children(self) -> None:
        """End every program, the gentle way first."""
        for child in self.children.values():
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        for child in self.children.values():
            try:
                child.process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    # -- what can be asked

    def ask(self, pod: str, requests: Sequence[Request]) -> list[Answer]:
        """Send requests from a pod's application, one after the other."""
        done = self.pods[pod].run(
            [*_module("redirector.demo.client"), "ask"],
            input=json.dumps([asdict(request) for request in requests]),
            timeout=PATIENCE + 10 * len(requests),
        )
        if done.returncode != 0:
            raise RedirectorError(f"the client in pod {pod} failed: {done.stderr.strip()}")
        return [Answer(**fields) for fields in json.loads(done.stdout)]

    @contextlib.contextmanager
    def traffic(self, *, kept: int, fresh: int, pause: float) -> Iterator[Traffic]:
        """A client that keeps sending to the service until the block is left."""
        log = self.files / "traffic"
        log.write_text("")
        argv = ["--host", SERVICE, "--kept", str(kept), "--fresh", str(fresh)]
        argv += ["--pause", str(pause), "--log", str(log)]
        with (self.files / "client-app.log").open("w") as output:
            process = self.pods[CLIENT].popen(
                [*_module("redirector.demo.client"), "keep-sending", *argv],
                stdout=output,
                stderr=output,
            )
        child = Child("the client", process, self.files / "client-app.log")
        self.children[child.name] = child
        traffic = Traffic(log, stop=lambda: _end(child))
        try:
            yield traffic
        finally:
            traffic.stop()

    def admin(self, pod: str, path: str) -> str | None:
        """What a sidecar's admin interface answers; None when it does not, or not with 200."""
        return network.within(self.pods[pod].netns, lambda: _get(ADMIN_PORT, path))

    def accepts(self, pod: str, address: str, port: int) -> bool:
        """Whether something in a pod accepts connections from within it."""

        def connect() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex((address, port)) == 0

        return network.within(self.pods[pod].netns, connect)

    def seen(self) -> dict[str, list[Seen]]:
        """The requests that reached the applications, by pod."""
        return {name: read_seen(self._seen(name)) for name in WEBS}

    def uid(self, pod: str) -> int:
        """The user that a sidecar runs as."""
        pid = self.children[f"{pod}'s Envoy"].process.pid
        return os.stat(f"/proc/{pid}").st_uid

    def wait(self, ready: Callable[[], object], what: str) -> None:
        """Until `ready()`; RedirectorError when that takes too long or a program has ended."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            for child in self.children.values():
                if child.name != "the client":
                    child.require()
            if time.monotonic() > deadline:
                raise RedirectorError(f"{what} is not ready after {PATIENCE:.0f} s")
            time.sleep(0.02)

    def _seen(self, pod: str) -> Path:
        return self.files / f"{pod}-seen"

    @staticmethod
    def _directory(path: Path) -> None:
        path.mkdir()
        path.chmod(0o755)  # whatever root's umask is


def _end(child: Child) -> None:
    child.process.terminate()
    child.process.wait(PATIENCE)


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _xds_server() -> Path:
    beside = Path(sys.executable).with_name("xds-server")
    if not beside.exists():
        raise MachineError(f"{beside} is not installed; run make setup")
    return beside


def _manifests() -> Path:
    directory = Path(__file__).parents[2] / "manifests/demo"
    if not directory.is_dir():
        raise MachineError(f"{directory} is not there; run the demo from a checkout: make demo")
    return directory


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def _get(port: int, path: str) -> str | None:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()
    return body if response.status == 200 else None
