"""One case: a mesh of a size, so many clients, and what changes cost."""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from redirector.errors import RedirectorError
from xds_server.bench import bare, clients, served
from xds_server.bench.clients import Arrivals, Variant
from xds_server.bench.objects import Size
from xds_server.bench.served import Change, Cold, Command

_PATIENCE_S = 600.0
_LOOK_EVERY_S = 0.2
#: What memory is only needed while clients connect is given back after this.
_PASSING_S = 2.0
Progress = Callable[[str], None]


class BenchFailed(RedirectorError):  # noqa: N818 - reads as the state it reports
    """A process ended, or clients did not get what they asked for."""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    size: Size
    variant: Variant

    def __str__(self) -> str:
        size = self.size
        return (
            f"{size.clients} clients ({self.variant}), {size.services} services x "
            f"{size.endpoints} endpoints"
        )


@dataclass(frozen=True)
class Round:
    """One change as the clients saw it: from the change to a client's acknowledgement, in seconds
    (median, 99th of a hundred, last), and the bytes that each client was sent."""

    change: Change
    p50: float
    p99: float
    last: float
    clients: int
    bytes_each: float


@dataclass(frozen=True)
class Result:
    """All figures of a case: seconds and bytes. `connected` is how long it took until every client
    had everything; memory is resident, before and with the clients."""

    case: Case
    cold: Cold
    connected: float
    memory_before: int
    memory: int
    memory_after: int
    rounds: dict[Command, tuple[Round, ...]]
    #: Turn by turn with the moved endpoints: a server without any xDS that sends the same bytes.
    bare: tuple[Round, ...]

    @property
    def memory_each(self) -> float:
        return (self.memory - self.memory_before) / self.case.size.clients


def measure(case: Case, rounds: int, say: Progress) -> Result:
    """Run a case from cold. The server has a CPU to itself, the clients the others, if there are
    any."""
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    os.sched_setaffinity(0, allowed - {cpu} or allowed)
    try:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-xds-"))
            return _measure(case, rounds, say, f"{folder}/xds.sock", cpu, stack)
    finally:
        os.sched_setaffinity(0, allowed)


def _measure(
    case: Case,
    rounds: int,
    say: Progress,
    path: str,
    cpu: int,
    stack: contextlib.ExitStack,
) -> Result:
    say(f"{case}: translating")
    server = stack.enter_context(_process(served.run, f"unix:{path}", case.size, cpu))
    cold = _reply(server)
    before = _ask(server, Command.MEMORY)
    say(f"{case}: connecting")
    began = time.monotonic()
    crowd = stack.enter_context(_crowd(path, case))
    connected = time.monotonic() - began
    time.sleep(_PASSING_S)
    memory = _ask(server, Command.MEMORY)
    _ask(crowd, "arrivals")
    say(f"{case}: connecting to the yardstick")
    yardstick = stack.enter_context(_process(bare.run, f"unix:{path}.bare", case.variant, cpu))
    _reply(yardstick)
    others = stack.enter_context(_crowd(f"{path}.bare", case))
    _ask(others, "arrivals")
    say(f"{case}: {Command.MOVE_ENDPOINT}, {rounds} times")
    moves, measures = [], []
    for _ in range(rounds):
        # Turn by turn: a machine that is slow for a while is so for both.
        moves.append(_round(server, crowd, Command.MOVE_ENDPOINT))
        measures.append(_round(yardstick, others, int(moves[-1].bytes_each)))
    say(f"{case}: {Command.EDIT_POLICY}, {rounds} times")
    edits = [_round(server, crowd, Command.EDIT_POLICY) for _ in range(rounds)]
    found = {Command.MOVE_ENDPOINT: tuple(moves), Command.EDIT_POLICY: tuple(edits)}
    after = _ask(server, Command.MEMORY)
    return Result(case, cold, connected, before, memory, after, found, tuple(measures))


@contextlib.contextmanager
def _crowd(path: str, case: Case) -> Iterator[Connection]:
    """All clients, once they have all they asked for."""
    began = time.monotonic()
    with _process(clients.run, path, case.variant, range(case.size.clients)) as crowd:
        while (complete := _ask(crowd, "complete")) < case.size.clients:
            if time.monotonic() - began > _PATIENCE_S:
                raise BenchFailed(f"{complete} of {case.size.clients} clients have all")
            time.sleep(_LOOK_EVERY_S)
        yield crowd


def _round(server: Connection, crowd: Connection, command: Command | int) -> Round:
    """The command is the server's, or how many bytes the yardstick is to send."""
    change = _ask(server, command)
    arrivals: Arrivals = _ask(crowd, "arrivals")
    if change.unanswered or not arrivals.acknowledged:
        raise BenchFailed(f"{command}: {change.unanswered} clients did not answer")
    # What is left of the round before must not be paid for by the next.
    time.sleep(_LOOK_EVERY_S)
    took = sorted(moment - change.at for moment in arrivals.acknowledged)
    return Round(
        change,
        statistics.median(took),
        took[min(len(took) - 1, len(took) * 99 // 100)],
        took[-1],
        len(took),
        arrivals.received / len(took),
    )


@contextlib.contextmanager
def _process(target: Callable[..., None], *args: object) -> Iterator[Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _ask(process: Connection, question: object) -> Any:
    process.send(question)
    return _reply(process)


def _reply(process: Connection) -> Any:
    try:
        if not process.poll(_PATIENCE_S):
            raise BenchFailed(f"no answer within {_PATIENCE_S:.0f} s")
        return process.recv()
    except (EOFError, ConnectionError) as error:
        raise BenchFailed("a process of the measurement ended; see above") from error
