"""Real programs in a pod: where they are, what they exchange, how much went which way."""

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from mesh import Mesh, Way
from sidecars import Passthrough
from sockets import pod_socket
from waiting import eventually

from redirector.datapath.layout import Counter
from redirector.lab import LabPod
from redirector.machine import STATE
from redirector.model import Accelerate, Mode

#: What tests/programs/setup has unpacked.
UNPACKED = STATE / "programs"
#: Debian's `nobody`: servers run without privileges, and not as the sidecar's user.
USER = 65534
MB = 10**6


def program(name: str) -> Path:
    """The program's path; an assertion that says how to get it."""
    (postgresql,) = sorted(UNPACKED.glob("usr/lib/postgresql/*/bin"))[-1:] or [UNPACKED]
    places = (UNPACKED / "usr/sbin", postgresql, "/usr/sbin", "/usr/bin", "/bin")
    found = shutil.which(name, path=os.pathsep.join(map(str, places)))
    assert found, f"{name} is not here; run: bash tests/programs/setup {UNPACKED}"
    return Path(found)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def noise(path: Path, size: int, seed: int) -> Path:
    """Make a file whose every block differs, readable by everybody."""
    path.write_bytes(random.Random(seed).randbytes(size))
    path.chmod(0o644)
    return path


def own_folder(path: Path) -> Path:
    """Make a folder of the servers' user."""
    path.mkdir(parents=True)
    os.chown(path, USER, USER)
    return path


def serve(pod: LabPod, argv: list[str | Path], log: Path, port: int, **options: Any) -> Popen[Any]:
    """Start a server in the pod; it listens on `port` when this returns."""
    with log.open("wb") as output:
        process = pod.popen(
            argv, uid=options.pop("uid", USER), gid=USER, stdout=output, stderr=output, **options
        )

    def listens() -> bool:
        assert process.poll() is None, f"{argv[0]} ended:\n{log.read_text()}"
        with pod_socket(pod) as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    eventually(f"{argv[0]} on port {port}", listens)
    return process


@dataclass(frozen=True)
class Passed:
    """What both sidecars and the datapath have counted by some moment."""

    connections: tuple[int, int]
    bytes: tuple[int, int]
    redirected: tuple[int, int]


@dataclass(frozen=True)
class Route:
    """The way from the client's application to the server's, through both sidecars."""

    mesh: Mesh
    way: Way
    sidecars: tuple[Passthrough, Passthrough]
    folder: Path

    @property
    def client(self) -> LabPod:
        return self.mesh.client

    @property
    def server(self) -> LabPod:
        return self.mesh.server

    @contextmanager
    def carries(self, size: int, connections: int = 1, *, deferred: bool = False) -> Iterator[None]:
        """Asserts that so much went through both sidecars, short-circuited or not at all.

        A server that defers accept has no established socket when its sidecar first sends: what
        goes between these two is not short-circuited.
        """
        before = self._passed()
        yield
        after = self._passed()
        for then, now in zip(before.connections, after.connections, strict=True):
            assert now - then >= connections
        for then, now in zip(before.bytes, after.bytes, strict=True):
            assert now - then >= size
        accelerated = self.way == (Mode.EBPF, Accelerate.ON)
        for then, now, expected in zip(
            before.redirected,
            after.redirected,
            (accelerated, accelerated and not deferred),
            strict=True,
        ):
            assert (now > then) is expected

    def _passed(self) -> Passed:
        outbound, inbound = (
            {name.removeprefix(f"tcp.{side}."): value for name, value in sidecar.stats().items()}
            for sidecar, side in zip(self.sidecars, ("outbound", "inbound"), strict=True)
        )
        redirected = [
            self.mesh.counters(pod)[Counter.REDIRECTED_BYTES] for pod in (self.client, self.server)
        ]
        return Passed(
            (outbound["downstream_cx_total"], inbound["downstream_cx_total"]),
            (_both_ways(outbound), _both_ways(inbound)),
            (redirected[0], redirected[1]),
        )


def _both_ways(stats: dict[str, int]) -> int:
    return stats["downstream_cx_rx_bytes_total"] + stats["downstream_cx_tx_bytes_total"]
