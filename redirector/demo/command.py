"""`redirector demo`: the steps in order, and what happens when one cannot be done."""

import argparse
import io
import os
import subprocess
from collections.abc import Callable
from typing import TextIO

from redirector import compare
from redirector.demo.begin import enroll, lay_out, serve
from redirector.demo.change import change_modes, reweigh
from redirector.demo.console import Console, Step
from redirector.demo.end import take_down
from redirector.demo.interruption import interruptible
from redirector.demo.show import show
from redirector.demo.world import World
from redirector.errors import RedirectorError

#: Few enough for a minute, and among them one that eBPF loses.
_COMPARED = "echo-64B,http-1-sidecar-c16,http-2-sidecars-c1,connect-rate,bulk-1KiB"

Action = Callable[[World, Console], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `redirector demo`."""
    parser.add_argument(
        "--no-compare", action="store_true", help="leave the comparison out, which takes a minute"
    )


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    """Show everything and take it down again; 0 when every step passed, else 1. Needs root.

    MachineError before anything is made when this machine lacks something.
    """
    console = Console(out)
    actions = _actions(compare_too=not arguments.no_compare)
    steps = [Step(number, title) for number, (title, _) in actions.items()]
    last = steps[-1]
    kernel, cpus = os.uname().release, len(os.sched_getaffinity(0))
    with interruptible() as interruption, World() as world:
        console.title(
            "     redirector: eBPF takes the traffic to Envoy, Envoy understands it",
            f"     Linux {kernel}, {cpus} CPUs, node {world.node.name}",
        )
        for name in world.swept:
            console.say(f"An earlier demo, {name}, was killed: what it left is removed now.")
        try:
            for step in steps[:-1]:
                done = _run_step(step, actions[step.number][1], world, console)
                interruption.check()
                if not done and step.number in _FOUNDATIONS:
                    break
        except KeyboardInterrupt:
            interruption.remember()
            console.line()
            console.say("Interrupted: everything is taken down.")
        # An impatient second Ctrl-C must not leave half of it.
        with interruption.held_off():
            if any(step.failed for step in steps):
                _last_words(world, console)
            _run_step(last, actions[last.number][1], world, console)
            world.close()
        passed = console.summary(steps)
        interruption.check()
    return 0 if passed else 1


#: Without these nothing that follows makes sense.
_FOUNDATIONS = frozenset({1, 2, 3})


def _actions(*, compare_too: bool) -> dict[int, tuple[str, Action]]:
    actions: dict[int, tuple[str, Action]] = {
        1: ("A small node: four pods, three with an Envoy beside the application", lay_out),
        2: ("The xDS server, on Kubernetes manifests in a directory", serve),
        3: ("Enroll three pods in eBPF mode", enroll),
        4: ("Real HTTP goes through it", show),
        5: ("New weights while traffic runs", reweigh),
        6: ("From eBPF to iptables and back while traffic runs", change_modes),
        8: ("Take everything down and look for what is left", take_down),
    }
    if compare_too:
        actions[7] = ("A short comparison of both modes and what they replace", _compare)
    return dict(sorted(actions.items()))


class _Progress(io.StringIO):
    """Where the comparison says what it is at."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def write(self, text: str) -> int:
        if text.strip():
            self._console.progress(text.strip())
        return len(text)


def _compare(_world: World, console: Console) -> None:
    """On pods of its own."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    options = parser.parse_args(["--quick", "--cases", _COMPARED])
    console.quiet(f"$ redirector compare --quick --cases {_COMPARED}")
    table = io.StringIO()
    code = compare.run(options, table, progress=_Progress(console))
    console.say()
    for line in table.getvalue().splitlines():
        console.line(line)
    console.say()
    console.check(code == 0, "the comparison ran to its end")


def _run_step(step: Step, action: Action, world: World, console: Console) -> bool:
    """Whether the step could be done; its checks may have failed all the same."""
    with console.step(step):
        try:
            action(world, console)
        except (RedirectorError, OSError, subprocess.SubprocessError) as error:
            console.failure(f"{type(error).__name__}: {error}")
            return False
    return True


def _last_words(world: World, console: Console) -> None:
    """What the programs wrote, before it is gone; when all is well nobody wants to read it."""
    console.say()
    for child in world.children.values():
        if child.process.poll():
            console.say(f"{child.name} ended with code {child.process.returncode}")
        for words in child.words(most=5):
            console.quiet(f"{child.name}: {words}")
