"""The agent that keeps all these pods whole: its memory, and how long its metrics take."""

import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redirector.bench.ground import COMMAND, Ground, Line, line
from redirector.model import Mode

_PATIENCE_S = 60.0
_KIB = 1024.0


def agent(ground: Ground, mode: Mode) -> Iterator[Line]:
    """Resident memory, once it has compared all pods and its metrics were read."""
    with _running(ground) as (pid, port):
        metrics = []
        for _ in range(3):
            began = time.perf_counter()
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_PATIENCE_S).read()
            metrics.append((time.perf_counter() - began) * 1000)
        pods = len(ground.pods) + 1
        yield line(f"{mode}: agent, {pods} pods: memory (VmHWM)", [_peak(pid)], "MiB", "<= 64")
        yield line(f"{mode}: agent, {pods} pods: metrics read", metrics, "ms")


@contextmanager
def _running(ground: Ground) -> Iterator[tuple[int, int]]:
    """An agent of the full side, ready: its pid and its endpoint's port."""
    argv = [*COMMAND, "run", "--no-kubernetes", "--log", "json", "--metrics", "127.0.0.1:0"]
    places = ground.many.environment()
    with subprocess.Popen(argv, env=places, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            port = json.loads(process.stderr.readline())["metrics_port"]
            _until_ready(port)
            yield process.pid, port
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=_PATIENCE_S)


def _until_ready(port: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=_PATIENCE_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _peak(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (peak,) = (row.split()[1] for row in status.splitlines() if row.startswith("VmHWM:"))
    return int(peak) / _KIB
