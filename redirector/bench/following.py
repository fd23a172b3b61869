"""What it costs new connections that somebody follows the flows.

The rate of connections tells it only on a machine that does nothing else; the time that the kernel
measures in the programs tells it on any.
"""

import contextlib
import io
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from redirector.bench.ground import Ground, Line, Side, line
from redirector.compare.cases import Load
from redirector.compare.topology import LOAD_SCRIPT
from redirector.datapath import libbpf
from redirector.datapath.layout import Counter
from redirector.flows.command import PERIOD
from redirector.flows.event import Clock, from_event, to_line
from redirector.lab import LabPod
from redirector.model import Mode
from redirector.network import netns_cookie

#: Nobody has it: TEST-NET-2.
_SERVICE = "198.51.100.7:80"
_WARMUP = 0.2


def following(ground: Ground, mode: Mode) -> Iterator[Line]:
    """One load all the time; turn by turn somebody follows, on another CPU, and nobody does."""
    if mode is not Mode.EBPF:
        return
    pod, side = ground.alone, ground.few
    pairs: list[dict[bool, _Price]] = []
    with libbpf.timing_programs(), _load(ground, pod):
        time.sleep(_WARMUP)
        for number in range(ground.rounds):
            found: dict[bool, _Price] = {}
            for followed in (False, True) if number % 2 else (True, False):
                with _followed(side) if followed else contextlib.nullcontext():
                    found[followed] = _measure(ground, side, pod)
            pairs.append(found)
    for followed, text in ((False, "nobody follows"), (True, "followed")):
        programs = [pair[followed].programs_us for pair in pairs]
        yield line(f"ebpf: a new connection's time in the programs, {text}", programs, "us")
    extra = [
        100 * (pair[True].programs_us - pair[False].programs_us) / pair[False].cpu_us
        for pair in pairs
    ]
    yield line("ebpf: what following adds to a new connection's CPU time", extra, "%", "<= 3")
    rates = [pair[True].rate / pair[False].rate for pair in pairs]
    yield line("ebpf: new connections a second, followed to not", rates, "", ">= 0.97")


@contextlib.contextmanager
def _load(ground: Ground, pod: LabPod) -> Iterator[None]:
    argv: list[str | Path] = [ground.luajit, "-", Load.CONNECT.value, _SERVICE, "0", "3600", "1"]
    with LOAD_SCRIPT.open() as script:
        load = pod.popen(argv, cpus={ground.cpu}, stdin=script, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        load.kill()
        load.wait()


@dataclass(frozen=True)
class _Price:
    """New connections a second; for each, the pod's CPU time and the programs' part of it."""

    rate: float
    cpu_us: float
    programs_us: float


def _measure(ground: Ground, side: Side, pod: LabPod) -> _Price:
    cookie = netns_cookie(pod.netns)

    def now() -> tuple[float, int, int, float]:
        made = side.datapath.maps.counted(cookie).counters()[Counter.STEERED_OUTBOUND]
        return time.monotonic(), made, pod.cpu_usec(), _in_programs(side)

    began = now()
    time.sleep(ground.seconds)
    seconds, made, cpu, programs = (
        after - before for before, after in zip(began, now(), strict=True)
    )
    return _Price(made / seconds, cpu / made, programs / made)


def _in_programs(side: Side) -> float:
    """µs that all runs of the datapath's programs took so far."""
    total = 0
    for path in side.datapath.programs.iterdir():
        with libbpf.opened(path) as program:
            total += libbpf.run_time_ns(program)
    return total / 1000


@contextlib.contextmanager
def _followed(side: Side) -> Iterator[None]:
    """As `redirector flows --follow -o json` does it, into memory."""
    followers = side.datapath.followers()
    assert followers is not None
    over = threading.Event()
    with followers.follow() as follower:

        def read() -> None:
            while not over.wait(PERIOD):
                out, clock = io.StringIO(), Clock(time.time_ns(), time.monotonic_ns())
                for event in follower.read():
                    print(to_line(from_event(event, clock, {})), file=out)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield
        finally:
            over.set()
            reader.join()
