"""What it costs new connections that somebody follows the flows.

Two things may slow them: what the programs do for each event, and that another CPU works on these
events, where CPUs share what makes them fast (caches, a core of the host's). So turn by turn nobody
follows, `redirector flows --follow` does, and nobody does while something else works as much.
The rates tell it only on a machine that does nothing else; CPU time, and the part of it that the
kernel measures in the programs, tells it on any.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import chain
from pathlib import Path

from redirector.bench.ground import COMMAND, OUTBOUND_PORT, Ground, Line, Side, line
from redirector.compare.cases import Load
from redirector.compare.topology import LOAD_SCRIPT
from redirector.datapath import libbpf
from redirector.datapath.followers import Followers
from redirector.datapath.layout import EventRecord
from redirector.flows.command import PERIOD
from redirector.flows.event import Clock, from_event, to_line
from redirector.lab import LabPod
from redirector.model import Mode
from redirector.network import netns_cookie

#: Where connections go: nobody has the first, TEST-NET-2; the second is the same server.
_SERVICES = {"steered": "198.51.100.7:80", "direct": f"127.0.0.1:{OUTBOUND_PORT}"}
_WARMUP = 0.2
#: Many short measurements: what the host does to a CPU changes from second to second.
_SHORTER = 2
_PATIENCE_S = 60.0


class _Turn(StrEnum):
    ALONE = "nobody follows"
    FOLLOWED = "followed"
    BESIDE = "as much work beside it"


def following(ground: Ground, mode: Mode) -> Iterator[Line]:
    """What it costs steered connections, and direct ones, of which else nothing is kept."""
    if mode is not Mode.EBPF:
        return
    for kind, service in _SERVICES.items():
        yield from _lines(kind, _rounds(ground, service))


def _rounds(ground: Ground, service: str) -> "list[dict[_Turn, _Price]]":
    """One load all the time, and on other CPUs, turn by turn, nothing, a follower, other work."""
    pod, side = ground.alone, ground.few
    followers = side.datapath.followers()
    assert followers is not None
    rounds: list[dict[_Turn, _Price]] = []
    with libbpf.timing_programs(), _load(ground, pod, service):
        _await_load(side, pod)
        turns: dict[_Turn, Callable[[], AbstractContextManager[int]]] = {
            _Turn.ALONE: lambda: contextlib.nullcontext(os.getpid()),
            _Turn.FOLLOWED: partial(_followed, side, followers),
            _Turn.BESIDE: partial(_busy, _some_events(followers)),
        }
        for number in range(ground.rounds * _SHORTER):
            found: dict[_Turn, _Price] = {}
            for turn in turns if number % 2 else reversed(turns):
                with turns[turn]() as pid:
                    found[turn] = _measure(ground, side, pod, pid)
            rounds.append(found)
    return rounds


def _lines(kind: str, rounds: "list[dict[_Turn, _Price]]") -> Iterator[Line]:
    def ratios(over: _Turn, under: _Turn) -> list[float]:
        return [each[over].rate / each[under].rate for each in rounds]

    for turn in (_Turn.ALONE, _Turn.FOLLOWED):
        programs = [each[turn].programs_us for each in rounds]
        yield line(f"ebpf: {kind}: time in the programs, {turn}", programs, "us")
    extra = [
        100
        * (each[_Turn.FOLLOWED].programs_us - each[_Turn.ALONE].programs_us)
        / each[_Turn.ALONE].cpu_us
        for each in rounds
    ]
    yield line(f"ebpf: {kind}: what following adds there, of CPU time", extra, "%")
    whole = [each[_Turn.FOLLOWED].cpu_us / each[_Turn.ALONE].cpu_us for each in rounds]
    yield line(f"ebpf: {kind}: CPU time, followed to not", whole, "", "<= 1.03")
    for turn in (_Turn.FOLLOWED, _Turn.BESIDE):
        busy = [100 * each[turn].busy for each in rounds]
        yield line(f"ebpf: {kind}: work on other CPUs, {turn}", busy, "%")
    name = f"ebpf: {kind}: connections a second"
    yield line(f"{name}, followed to not", ratios(_Turn.FOLLOWED, _Turn.ALONE), "", ">= 0.97")
    yield line(f"{name}, such work to not", ratios(_Turn.BESIDE, _Turn.ALONE), "")
    yield line(f"{name}, followed to such work", ratios(_Turn.FOLLOWED, _Turn.BESIDE), "")


@contextlib.contextmanager
def _load(ground: Ground, pod: LabPod, service: str) -> Iterator[None]:
    argv: list[str | Path] = [ground.luajit, "-", Load.CONNECT.value, service, "0", "3600", "1"]
    with LOAD_SCRIPT.open() as script:
        load = pod.popen(argv, cpus={ground.cpu}, stdin=script, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        load.kill()
        load.wait()


def _await_load(side: Side, pod: LabPod) -> None:
    """Return once it connects; among a thousand pods it takes its time to start."""
    cookie = netns_cookie(pod.netns)
    before, deadline = _made(side, cookie), time.monotonic() + _PATIENCE_S
    while _made(side, cookie) == before:
        if time.monotonic() > deadline:
            raise TimeoutError("the load makes no connection")
        time.sleep(0.02)
    time.sleep(_WARMUP)


def _made(side: Side, cookie: int) -> int:
    """How many connections were decided, steered or not."""
    return sum(side.datapath.maps.counted(cookie).rules().values())


@dataclass(frozen=True)
class _Price:
    """New connections a second; for each, the pod's CPU time and the programs' part of it.

    `busy`: CPU seconds that the process beside it took, a second.
    """

    rate: float
    cpu_us: float
    programs_us: float
    busy: float


def _measure(ground: Ground, side: Side, pod: LabPod, beside: int) -> _Price:
    cookie = netns_cookie(pod.netns)
    # MAKE_PROCESS_CPUCLOCK, CPUCLOCK_SCHED: linux/posix-timers.h
    clock = (~beside << 3) | 2

    def now() -> tuple[float, int, int, float, float]:
        made = _made(side, cookie)
        work = time.clock_gettime(clock)
        return time.monotonic(), made, pod.cpu_usec(), _in_programs(side), work

    began = now()
    time.sleep(ground.seconds / _SHORTER)
    seconds, made, cpu, programs, work = (
        after - before for before, after in zip(began, now(), strict=True)
    )
    if not made:
        raise TimeoutError(f"the load made no connection in {seconds:.2f} s")
    return _Price(made / seconds, cpu / made, programs / made, work / seconds)


def _in_programs(side: Side) -> float:
    """µs that all runs of the datapath's programs took so far."""
    total = 0
    for path in side.datapath.programs.iterdir():
        with libbpf.opened(path) as program:
            total += libbpf.run_time_ns(program)
    return total / 1000


@contextlib.contextmanager
def _followed(side: Side, followers: Followers) -> Iterator[int]:
    """By the command; its pid."""
    argv = [*COMMAND, "flows", "--follow", "-o", "json"]
    command = subprocess.Popen(argv, env=side.environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not followers.sweep():
            if time.monotonic() > deadline or command.poll() is not None:
                raise TimeoutError("redirector flows --follow does not come up")
            time.sleep(0.02)
        time.sleep(_WARMUP)
        yield command.pid
    finally:
        command.send_signal(signal.SIGINT)
        command.wait(timeout=_PATIENCE_S)


def _some_events(followers: Followers) -> list[EventRecord]:
    """What comes between two looks of a follower's."""
    with followers.follow() as follower:
        time.sleep(PERIOD)
        return list(chain.from_iterable(follower.read()))


@contextlib.contextmanager
def _busy(events: list[EventRecord]) -> Iterator[int]:
    """A follower's work on these, again and again, while nobody follows; the pid of who does it."""
    over = threading.Event()

    def work() -> None:
        with open(os.devnull, "w") as out:
            while not over.wait(PERIOD):
                clock = Clock(time.time_ns(), time.monotonic_ns())
                out.writelines(f"{to_line(from_event(event, clock, {}))}\n" for event in events)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        time.sleep(_WARMUP)
        yield os.getpid()
    finally:
        over.set()
        worker.join()
