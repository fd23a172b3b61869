"""`redirector compare`: options, the rounds, and where the report goes."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Self, TextIO, TypeVar

from redirector.compare import host, load, statistics
from redirector.compare.cases import CASES, Case, Rung
from redirector.compare.plan import MIN_ROUNDS, Plan
from redirector.compare.report import html, json, table
from redirector.compare.report.data import Report
from redirector.compare.topology import Topology
from redirector.errors import InputError, RedirectorError

FULL_ROUNDS, FULL_WARMUP, FULL_SECONDS = 10, 0.1, 0.5
QUICK_ROUNDS, QUICK_WARMUP, QUICK_SECONDS = 3, 0.03, 0.2
#: For all measurements of a quick run; the rest of its minute is set-up and clean-up.
QUICK_BUDGET = 42.0
MAX_ROUNDS = 1000

Progress = Callable[[str], None]
Choice = TypeVar("Choice")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `redirector compare`."""
    parser.add_argument("--quick", action="store_true", help="end within 60 s, less sure")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default {FULL_ROUNDS}")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help=f"a measurement's length; default {FULL_SECONDS}"
    )
    parser.add_argument(
        "--cases", metavar="LIST", help="some of: " + ",".join(case.name for case in CASES)
    )
    parser.add_argument("--rungs", metavar="LIST", help="some of: " + ",".join(Rung))
    parser.add_argument(
        "--cpu", type=int, metavar="N", help="the CPU to pin to; default the last one allowed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")


def run(arguments: argparse.Namespace, out: TextIO, progress: TextIO = sys.stderr) -> int:
    """Compare, print the table to `out`, write the files; the exit code. Needs root.

    Raises InputError on a wrong option before anything is set up.
    """
    plan = make_plan(arguments)
    cpu = choose_cpu(arguments.cpu, os.sched_getaffinity(0))
    for path in (arguments.json, arguments.html):
        _require_writable(path)

    def say(text: str) -> None:
        print(f"compare: {text}", file=progress, flush=True)

    report = compare(plan, cpu, say)
    out.write(table.render(report))
    for path, render in ((arguments.json, json.render), (arguments.html, html.render)):
        if path is not None:
            path.write_text(render(report))
            say(f"wrote {path}")
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Read the options into a plan. InputError names the option and the value."""
    quick: bool = arguments.quick
    plan = Plan(
        cases=_choose("--cases", arguments.cases, {case.name: case for case in CASES}),
        rungs=_choose("--rungs", arguments.rungs, {rung.value: rung for rung in Rung}),
        rounds=QUICK_ROUNDS if quick else FULL_ROUNDS,
        warmup=QUICK_WARMUP if quick else FULL_WARMUP,
        seconds=QUICK_SECONDS if quick else FULL_SECONDS,
        budget=QUICK_BUDGET if quick else None,
    )
    for option in ("rounds", "seconds"):
        if quick and getattr(arguments, option) is not None:
            raise InputError(f"--{option}: --quick sets it; leave one of the two out")
    if arguments.rounds is not None:
        if not MIN_ROUNDS <= arguments.rounds <= MAX_ROUNDS:
            raise InputError(
                f"--rounds: {arguments.rounds} is not in {MIN_ROUNDS}-{MAX_ROUNDS}; "
                "one round has no spread"
            )
        plan = replace(plan, rounds=arguments.rounds)
    if arguments.seconds is not None:
        if not 0.05 <= arguments.seconds <= 60:
            raise InputError(f"--seconds: {arguments.seconds} is not in 0.05-60")
        warmup = min(plan.warmup, arguments.seconds)
        plan = replace(plan, seconds=arguments.seconds, warmup=warmup)
    return plan


def choose_cpu(asked: int | None, allowed: set[int]) -> int:
    """The CPU to pin to: the last allowed one, since interrupts like the first."""
    if asked is None:
        return max(allowed)
    if asked not in allowed:
        listed = ", ".join(map(str, sorted(allowed)))
        raise InputError(f"--cpu: {asked} is not a CPU this process may use; choose of: {listed}")
    return asked


def compare(plan: Plan, cpu: int, say: Progress) -> Report:
    """Lay out the pods, measure, take everything down again."""
    results: list[statistics.Result] = []
    say("laying out pods and sidecars")
    with (
        _Interruption() as interruption,
        _off_cpu(cpu),
        Topology(plan.rungs, cpu=cpu) as topology,
        interruption.until_cleanup(),
    ):
        facts = host.describe(
            topology.envoy, cpu=cpu, rounds=plan.rounds, warmup=plan.warmup, seconds=plan.seconds
        )
        say(f"node {topology.name}: {plan.cells()} measurements, all on CPU {cpu}")
        started = time.monotonic()
        shown: tuple[int, Case] | None = None
        for number, case, rung in plan.order():
            interruption.check()
            elapsed = time.monotonic() - started
            if plan.is_over(elapsed, number):
                say(f"out of time: round {number} is cut short")
                break
            if shown != (number, case):
                shown = (number, case)
                say(f"round {number}/{plan.rounds}  {case.name}  ({elapsed:.0f} s)")
            way = topology.way(case, rung)
            try:
                m = load.measure(
                    topology.luajit,
                    case,
                    way,
                    cpu=cpu,
                    warmup=plan.warmup,
                    seconds=plan.seconds_now(elapsed, len(results)),
                )
                if rung is Rung.SOCKMAP and number == 1:
                    topology.require_accelerated(way)
            except RedirectorError as error:
                topology.check()
                raise RedirectorError(f"rung {rung}: {error}") from error
            results.append(
                statistics.Result(
                    case=case.name,
                    rung=rung,
                    round=number,
                    p50_us=m.p50_us,
                    p90_us=m.p90_us,
                    p99_us=m.p99_us,
                    p999_us=m.p999_us,
                    ops_per_s=m.ops_per_s,
                    cpu_us_per_op=m.cpu_us_per_op,
                )
            )
    ratios = statistics.ratios(results)
    return Report(facts, plan.rounds, plan.cases, plan.rungs, tuple(results), tuple(ratios))


class _Interruption:
    """Ends the run in good order when a signal asks for it; a context manager."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._asked: int | None = None
        self._cleaning = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._stack.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # A forked child has a copy of our stack: unwinding it would clean up beneath our feet.
        if os.getpid() != self._owner:
            os._exit(128 + number)
        again, self._asked = self._asked is not None, number
        # Cleaning up is what was asked for; asking again must not stop it.
        if not again and not self._cleaning:
            self.check()

    @contextmanager
    def until_cleanup(self) -> Iterator[None]:
        """What is unwound after this is not interrupted."""
        try:
            yield
        finally:
            self._cleaning = True

    def check(self) -> None:
        """Raise if asked to end; Python swallows what a handler raises within a fork's hooks."""
        if self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self._asked is not None:
            raise SystemExit(128 + self._asked)


@contextmanager
def _off_cpu(cpu: int) -> Iterator[None]:
    """Keep this process off the measured CPU while there is another."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, allowed - {cpu} or allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _choose(option: str, listed: str | None, known: dict[str, Choice]) -> tuple[Choice, ...]:
    """The listed ones in their fixed order; all without a list."""
    if listed is None:
        return tuple(known.values())
    names = [name.strip() for name in listed.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"{option}: {name!r} is none of: {', '.join(known)}")
    return tuple(value for name, value in known.items() if name in names)


def _require_writable(path: Path | None) -> None:
    """Minutes of measuring are not to end with a file that cannot be written."""
    if path is None:
        return
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
