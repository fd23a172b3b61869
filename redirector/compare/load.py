"""Running the load of one case on one way: what it says, and what the cgroups say of its price."""

import select
import subprocess
from dataclasses import dataclass
from pathlib import Path

from redirector.compare.cases import Case
from redirector.compare.topology import LOAD_SCRIPT, Way
from redirector.errors import RedirectorError

#: Beyond warm-up and measurement: starting, and draining a stream.
PATIENCE = 30.0
_TRIES = 3


@dataclass(frozen=True)
class Measurement:
    """What one run of the load told. Latencies in µs, None where the case has none."""

    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    p999_us: float | None
    ops_per_s: float
    cpu_us_per_op: float


def measure(
    luajit: Path, case: Case, way: Way, *, cpu: int, warmup: float, seconds: float
) -> Measurement:
    """Run the load for `seconds` after `warmup`; CPU time is counted between, from the cgroups.

    On a busy machine the count may begin when the load has ended: then it is run again.

    Raises RedirectorError naming case and address when the load fails or does not end.
    """
    for _ in range(_TRIES):
        output, cpu_usec = _run(luajit, case, way, cpu=cpu, warmup=warmup, seconds=seconds)
        if cpu_usec:
            return parse(output, cpu_usec)
    raise RedirectorError(
        f"{case.name}: machine too busy to measure {seconds:g} s; make --seconds longer"
    )


def _run(
    luajit: Path, case: Case, way: Way, *, cpu: int, warmup: float, seconds: float
) -> tuple[str, int]:
    """What the load prints, and the CPU time it took in µs."""
    argv: list[str | Path] = [luajit, "-", case.load, way.address]
    argv += [str(warmup), str(seconds), str(case.number)]
    with LOAD_SCRIPT.open() as script:
        # Unbuffered, so that what follows the first line is still in the pipe.
        process = way.client.popen(
            argv,
            cpus={cpu},
            stdin=script,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], warmup + PATIENCE)
        begun = bool(ready) and process.stdout.readline() == b"measuring\n"
        before = _cpu_usec(way)
        output, complaint = process.communicate(timeout=seconds + PATIENCE if begun else 0.5)
        after = _cpu_usec(way)
    except subprocess.TimeoutExpired:
        begun, output, complaint = False, b"", b"no end in sight"
    finally:
        process.kill()
        process.wait()
    if not begun or process.returncode != 0:
        reason = complaint.decode(errors="replace").strip() or f"exit code {process.returncode}"
        raise RedirectorError(f"{case.name}: luajit load.lua {case.load} {way.address}: {reason}")
    return output.decode(), after - before


def parse(output: str, cpu_usec: int) -> Measurement:
    """Read the line that `load.lua` ends with; `cpu_usec` is what its operations cost.

    Raises RedirectorError when it counted no operation.
    """
    values = {key: float(value) for key, _, value in (w.partition("=") for w in output.split())}
    operations = values["operations"]
    if operations == 0:
        raise RedirectorError("luajit load.lua: not one operation ended within the time given")
    return Measurement(
        p50_us=values.get("p50_us"),
        p90_us=values.get("p90_us"),
        p99_us=values.get("p99_us"),
        p999_us=values.get("p999_us"),
        ops_per_s=operations / values["elapsed_s"],
        cpu_us_per_op=cpu_usec / operations,
    )


def _cpu_usec(way: Way) -> int:
    return sum(pod.cpu_usec() for pod in way.pods)
