"""Facts of the machine that a reader of the figures wants to know."""

import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PINNING = (
    "every process of a measurement on one CPU: no figure hangs on where the scheduler puts the "
    "peer, or on how long an idle CPU takes to wake; time an operation then is work an operation"
)


@dataclass(frozen=True)
class Host:
    """Where and how it was measured. Times in seconds, UTC."""

    date: str
    kernel: str
    cpu_model: str
    cpus: int
    memory_mib: int
    load_average: float
    pinned_to_cpu: int
    pinning: str
    envoy: str
    rounds: int
    warmup_s: float
    seconds: float


def describe(
    envoy: Path, *, cpu: int, rounds: int, warmup: float, seconds: float, proc: Path = Path("/proc")
) -> Host:
    """Read the machine's facts; call it before the load, for the load average's sake."""
    version = subprocess.run(
        [envoy, "--version"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    return Host(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        kernel=os.uname().release,
        cpu_model=_field(proc / "cpuinfo", "model name") or os.uname().machine,
        cpus=len(os.sched_getaffinity(0)),
        memory_mib=int((_field(proc / "meminfo", "MemTotal") or "0").split()[0]) // 1024,
        load_average=float((proc / "loadavg").read_text().split()[0]),
        pinned_to_cpu=cpu,
        pinning=PINNING,
        envoy=_version(version),
        rounds=rounds,
        warmup_s=warmup,
        seconds=seconds,
    )


def _version(output: str) -> str:
    """`.../envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL` -> 1.40.0."""
    parts = output.partition("version:")[2].strip().split("/")
    return parts[1] if len(parts) > 1 else output.strip()


def _field(path: Path, key: str) -> str | None:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
