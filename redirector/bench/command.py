"""`python -m redirector.bench.command`: every figure, a line each. Needs root."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from redirector.bench import agents, following, nodes
from redirector.bench.ground import MOST_PODS, Ground, Line
from redirector.compare.command import choose_cpu
from redirector.errors import RedirectorError
from redirector.model import Mode

#: In this order: the first enrols all pods, the last takes them off.
Part = Callable[[Ground, Mode], Iterator[Line]]
PARTS: tuple[Part, ...] = (
    nodes.enrolment,
    nodes.commands,
    nodes.connections,
    following.following,
    agents.agent,
    nodes.release,
)


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="bench-node", description=__doc__)
    parser.add_argument("--pods", type=int, default=MOST_PODS, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one measurement")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), help="default: both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    given = parser.parse_args()
    if not 1 <= given.pods <= MOST_PODS:
        parser.error(f"--pods {given.pods}: give 1 to {MOST_PODS}")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: give 1 or more")
    allowed = os.sched_getaffinity(0)
    cpu = choose_cpu(None, allowed)
    # What measures stays off the CPU that is measured on.
    os.sched_setaffinity(0, allowed - {cpu} or allowed)
    lines: list[Line] = []
    try:
        with Ground(given.pods, cpu, given.rounds, given.seconds) as ground:
            for mode in [given.mode] if given.mode else list(Mode):
                for part in PARTS:
                    for line in part(ground, mode):
                        print(line, flush=True)
                        lines.append(line)
    except RedirectorError as error:
        print(f"bench-node: {error}", file=sys.stderr)
        return error.exit_code
    if given.json:
        given.json.write_text(json.dumps([dataclasses.asdict(line) for line in lines], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
