"""Agents as processes, and pods as their kubelet would make them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import apiserver
import probes
from apiserver import ApiServer

from redirector.lab import LabPod, Node
from redirector.model import Mode, Pod
from redirector.records import Records
from redirector.steering import Verdict

#: Only a failure waits so long.
PATIENCE_S = 30.0
PORT = 80
UID = "0a1b2c3d-0000-4000-8000-%012d"


def until(happened: Callable[[], object], what: Callable[[], object] = lambda: "") -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"it does not happen: {what()}"
        time.sleep(0.02)


@dataclass
class Running:
    """An agent."""

    process: "subprocess.Popen[str]"
    log: Path
    lines_read: int = 0

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged so far."""
        text = self.log.read_text()
        return [json.loads(line) for line in text.splitlines() if text.endswith("\n")]

    def said(self, message: str, **fields: object) -> list[dict[str, Any]]:
        """The lines with this text and these fields."""
        return [
            line
            for line in self.lines()
            if message in line["message"] and fields.items() <= line.items()
        ]

    def get(self, path: str) -> tuple[int, str]:
        """Ask its endpoint."""
        until(lambda: self.said("started"), self.log.read_text)
        port = self.said("started")[-1]["metrics_port"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM; it ends in good order."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE_S) == 0, self.log.read_text()


@dataclass
class Ground:
    """A node with a cluster around it; everything ends with the test."""

    node: Node
    server: ApiServer
    records: Records
    pins: Path
    log: Path
    pods: dict[str, LabPod] = field(default_factory=dict)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self, *options: str, kubernetes: bool = True, under: Sequence[str] = ()) -> Running:
        """An agent; it looks at the kernel every half second. `under` is a program to start it."""
        source = ["--api-server", self.server.url, "--node", "node-1"]
        command = [*under, sys.executable, "-m", "redirector.cli", "run", "--log", "json"]
        command += ["--metrics", "127.0.0.1:0", "--cgroup-root", str(self.node.cgroup)]
        command += ["--resync", "0.5", *(source if kubernetes else ["--no-kubernetes"]), *options]
        with self.log.open("w") as log:
            process = subprocess.Popen(command, stderr=log, text=True, env=self.environment)
        made = Running(process, self.log)
        self.stack.callback(made.kill)
        return made

    @property
    def environment(self) -> dict[str, str]:
        """Where commands find records and pins."""
        places = {"REDIRECTOR_STATE": self.records.directory, "REDIRECTOR_PINS": self.pins}
        return {**os.environ, **{name: str(place) for name, place in places.items()}}

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run `redirector WORDS` to its end."""
        command = [sys.executable, "-m", "redirector.cli", *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def pod(self, name: str, number: int, listen: bool = True) -> LabPod:
        """A pod of the class burstable, as kubelets with the systemd driver lay it out."""
        uid = (UID % number).replace("-", "_")
        cgroup = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice"
        made = self.node.pod(name, cgroup=cgroup)
        self.pods[name] = made
        if listen:
            listeners = [(Verdict.OUTBOUND, 15001), (Verdict.INBOUND, 15006)]
            probes.start(made, listeners, sidecar=True)
            probes.start(made, [(Verdict.DIRECT, PORT)])
        return made

    def tell(self, name: str, number: int, **annotations: str) -> None:
        """The API server has (another version of) this pod."""
        self.server.put("pods", apiserver.pod(name, UID % number, annotations=annotations))

    def record(self, name: str) -> Pod | None:
        """What is recorded of default/NAME."""
        return self.records.get(f"default/{name}")

    def mode(self, name: str) -> Mode | None:
        record = self.record(name)
        return record.mode if record else None

    def until_mode(self, name: str, mode: Mode | None) -> None:
        """Wait until default/NAME is enrolled in this mode, or not at all."""
        until(lambda: self.mode(name) is mode, self.log.read_text)
        # Records are written before the kernel is touched, under the same lock.
        with self.records.locked():
            pass

    def verdict(self, name: str, to: LabPod, port: int = PORT) -> Verdict | str:
        """Where a connection of the pod's application arrives."""
        (arrival,) = self.pods[name].call(probes.dial, [probes.Call(ip_address(to.ip), port)])
        return arrival if isinstance(arrival, str) else arrival.verdict


@contextlib.contextmanager
def ground(node: Node, records: Records, pins: Path, log: Path) -> Iterator[Ground]:
    """A cluster of one node; nothing is in it yet but the namespace `default`."""
    with ApiServer() as server:
        made = Ground(node, server, records, pins, log)
        server.put("namespaces", apiserver.namespace("default"))
        with made.stack:
            yield made
