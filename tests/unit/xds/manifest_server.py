"""`xds-server` as a process of its own, on a copy of the demo's manifests."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

from waiting import PATIENCE_S, eventually

from redirector.lab.closing import Closing

DEMO = Path(__file__).parents[3] / "manifests" / "demo"


class ManifestServer(Closing):
    """Runs as long as the context; `node` is a pod of the demo, `route` one of its routes."""

    node = "sidecar~10.77.0.10~client.demo~demo.svc.cluster.local"
    route = "outbound|80|web.demo"

    def __init__(self, place: Path) -> None:
        self._manifests = Path(shutil.copytree(DEMO, place / "manifests"))
        self._log = place / "log"
        command: list[str | Path] = [Path(sys.executable).with_name("xds-server")]
        command += ["--manifests", self._manifests, "--listen", "127.0.0.1:0"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stderr=log)

    def __enter__(self) -> Self:
        eventually(f"a server:\n{self.log}", lambda: "serving" in self.log or self._ended())
        return self

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE_S)

    def _ended(self) -> bool:
        assert self._process.poll() is None, f"xds-server ended:\n{self.log}"
        return False

    @property
    def port(self) -> int:
        """Where it listens."""
        found = re.search(r"listening on 127\.0\.0\.1:(\d+)", self.log)
        assert found, self.log
        return int(found[1])

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text()

    def change_weight(self, weight: int) -> None:
        """Change the route, which every sidecar of the demo has."""
        path = self._manifests / "route-web.yaml"
        text = re.sub(r"weight: \d+", f"weight: {weight}", path.read_text(), count=1)
        path.write_text(text)

    def peak_memory(self) -> int:
        """The most that was resident so far, in bytes; proc_pid_status(5)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found, status
        return int(found[1]) * 1024

    def stop(self) -> int:
        """End it as a service manager does; its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE_S)
