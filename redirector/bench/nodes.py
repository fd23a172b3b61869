"""Enrolling: its time, its memory, and what a thousand other pods cost each new connection."""

import time
from collections.abc import Iterator
from pathlib import Path

from redirector.bench.ground import Ground, Line, line
from redirector.compare.cases import CASES, Load
from redirector.compare.load import measure
from redirector.compare.topology import Way
from redirector.datapath import libbpf
from redirector.lab import LabPod
from redirector.model import Mode

#: How many enrolments stand for one point of the curve.
_WINDOW = 20
#: Nobody has it: TEST-NET-2.
_SERVICE = "198.51.100.7:80"
_KIB = 1024.0


def enrolment(ground: Ground, mode: Mode) -> Iterator[Line]:
    """Enrol them all, one after the other; what remains in the end is all of them enrolled."""
    ground.few.enroll(ground.alone, mode)
    yield line(
        f"{mode}: enroll the first pod of a node", [ground.many.enroll(ground.among, mode)], "ms"
    )
    before = _memory(ground.many.pins)
    times = [ground.many.enroll(pod, mode) for pod in ground.pods]
    window = min(_WINDOW, len(times))
    yield line(f"{mode}: enroll pods 2 to {window + 1}", times[:window], "ms", "<= 50")
    yield line(
        f"{mode}: enroll pods {len(times) - window + 2} to {len(times) + 1}",
        times[-window:],
        "ms",
        "<= 50",
    )
    if mode is Mode.EBPF:
        after = _memory(ground.many.pins)
        yield line("ebpf: memory of all maps, first pod only", [before / _KIB / _KIB], "MiB")
        yield line(
            "ebpf: memory of all maps for each more pod",
            [(after - before) / _KIB / len(times)],
            "KiB",
        )


def commands(ground: Ground, mode: Mode) -> Iterator[Line]:
    """The same as a command, its interpreter's start included."""
    for side, others, pod in (
        (ground.few, 0, ground.alone),
        (ground.many, len(ground.pods), ground.among),
    ):
        options = ("--netns", pod.netns, "--cgroup", pod.cgroup, "--mode", mode)
        times = []
        for _ in range(ground.rounds):
            side.enrollment.unenroll(pod.name)
            times.append(side.command("enroll", pod.name, *options))
        yield line(f"{mode}: redirector enroll, {others} others enrolled", times, "ms")
    yield line(
        "redirector --help: the interpreter's own part",
        [ground.few.command("--help") for _ in range(ground.rounds)],
        "ms",
    )


def connections(ground: Ground, mode: Mode) -> Iterator[Line]:
    """New connections a second with all the others enrolled, to those with none: interleaved."""
    case = next(case for case in CASES if case.load is Load.CONNECT)

    def rate(pod: LabPod) -> float:
        way = Way(pod, _SERVICE, (pod,))
        found = measure(
            ground.luajit, case, way, cpu=ground.cpu, warmup=0.1, seconds=ground.seconds
        )
        return found.ops_per_s

    ratios = []
    for number in range(ground.rounds):
        pair = [ground.alone, ground.among]
        rates = {pod.name: rate(pod) for pod in (pair if number % 2 else reversed(pair))}
        ratios.append(rates[ground.among.name] / rates[ground.alone.name])
    yield line(
        f"{mode}: new connections a second, {len(ground.pods)} other pods to none", ratios, "", "1"
    )


def release(ground: Ground, mode: Mode) -> Iterator[Line]:
    """Take them all off again."""

    def timed(pod: LabPod) -> float:
        began = time.perf_counter()
        ground.many.enrollment.unenroll(pod.name)
        return (time.perf_counter() - began) * 1000

    yield line(f"{mode}: unenroll a pod", [timed(pod) for pod in ground.pods], "ms")
    ground.many.enrollment.uninstall()
    ground.few.enrollment.uninstall()


def _memory(pins: Path) -> float:
    """Bytes of all pinned maps, as the kernel accounts them (memlock in fdinfo)."""
    total = 0
    for path in pins.rglob("maps/*"):
        with libbpf.opened(path) as fd:
            info = Path(f"/proc/self/fdinfo/{fd}").read_text()
        total += sum(int(row.split()[1]) for row in info.splitlines() if row.startswith("memlock"))
    return float(total)
