"""A node full of pods, and two datapaths on it: one with a single pod, one with all the others."""

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from redirector import machine
from redirector.compare.statistics import Spread, spread
from redirector.compare.topology import LOAD_SCRIPT, tune
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.lab.closing import Closing
from redirector.model import Accelerate, Mode
from redirector.records import Records

#: A bridge has 1,024 ports (net/bridge, BR_MAX_PORTS).
MOST_PODS = 1000
OUTBOUND_PORT = 15001
#: `redirector`, by this interpreter.
COMMAND = (sys.executable, "-P", "-m", "redirector.cli")
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Line:
    """One figure. `reach` is what it should stay below or above, in words; empty: only told."""

    name: str
    value: Spread
    unit: str
    reach: str = ""

    def __str__(self) -> str:
        low, high = f"{self.value.low:.3g}", f"{self.value.high:.3g}"
        reach = f"   (reach: {self.reach})" if self.reach else ""
        return f"{self.name:58}{self.value.median:>10.4g} {self.unit:5} {low} - {high}{reach}"


def line(name: str, values: list[float], unit: str, reach: str = "") -> Line:
    """A figure from several measurements of it."""
    return Line(name, spread(values), unit, reach)


class Side:
    """Records and pins of one of the two."""

    def __init__(self, pins: Path, state: Path) -> None:
        self.pins, self.state = pins, state
        self.datapath = Datapath(pins)
        self.enrollment = Enrollment(Records(state), self.datapath)

    def enroll(self, pod: LabPod, mode: Mode) -> float:
        """Enrol; how long it took, in ms."""
        began = time.perf_counter()
        self.enrollment.enroll(pod.name, pod.netns, pod.cgroup, mode, Accelerate.ON)
        return (time.perf_counter() - began) * 1000

    def environment(self) -> dict[str, str]:
        """That of a command: this interpreter's own way to its modules, and this side's places."""
        return {
            "PYTHONPATH": ":".join(path for path in sys.path if path),
            "REDIRECTOR_STATE": str(self.state),
            "REDIRECTOR_PINS": str(self.pins),
        }

    def command(self, *arguments: str | Path) -> float:
        """Run a command as users do, its interpreter's start included; ms."""
        argv = [*COMMAND, *arguments]
        began = time.perf_counter()
        subprocess.run(argv, env=self.environment(), check=True, stdout=subprocess.DEVNULL)
        return (time.perf_counter() - began) * 1000


class Ground(Closing):
    """Makes `pods` pods and two to measure on; takes everything down when closed."""

    def __init__(self, pods: int, cpu: int, rounds: int, seconds: float) -> None:
        machine.require_root()
        self.cpu, self.rounds, self.seconds = cpu, rounds, seconds
        self.luajit = machine.find_tool("luajit", "luajit")
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.close)
            files = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rdrbench-")))
            self.node = self._stack.enter_context(
                Node(prefix="rdrbench", subnet=IPv4Network("10.78.0.0/20"))
            )
            root = machine.ensure_bpffs()
            sides = []
            for name in ("few", "many"):
                side = Side(root / f"{self.node.name}-{name}", files / name)
                self._stack.callback(side.enrollment.uninstall)
                sides.append(side)
            self.few, self.many = sides
            self.alone, self.among = self.node.pod("alone"), self.node.pod("among")
            for pod in (self.alone, self.among):
                pod.call(tune)
                self._serve(pod)
            self.pods = [self.node.pod(f"p{number}") for number in range(pods)]
            undo.pop_all()

    def close(self) -> None:
        """Uninstall both, end all processes, remove the pods."""
        self._stack.close()

    def _serve(self, pod: LabPod) -> None:
        """A server in the sidecar's place; it answers whatever is steered to it."""
        with LOAD_SCRIPT.open() as script:
            server: subprocess.Popen[Any] = pod.popen(
                [self.luajit, "-", "serve-http", f"0.0.0.0:{OUTBOUND_PORT}"],
                sidecar=True,
                cpus={self.cpu},
                stdin=script,
            )
        self._stack.callback(server.kill)
        listening = f":{OUTBOUND_PORT:04X} "
        deadline = time.monotonic() + _PATIENCE_S
        while listening not in pod.run(["cat", "/proc/net/tcp"], check=True).stdout:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server in {pod.name} does not come up")
            time.sleep(0.05)
