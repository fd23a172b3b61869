"""Connections made all the time, some of them kept for ever, from a process of a pod."""

import ctypes
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import probes

from redirector.lab import LabPod
from redirector.model import IPAddress
from redirector.steering import Verdict

PORT = 80


class Phase(IntEnum):
    """Where a new connection may arrive now."""

    FREE = 0
    CHANGING = 1
    ENROLLED = 2


@dataclass(frozen=True)
class Traffic:
    """A process that connects all the time and keeps some connections for ever."""

    process: Any
    problems: Any
    served: Any

    def check(self) -> None:
        """Assert that everything went as it must so far."""
        assert not self.problems.poll(), self.problems.recv()
        assert self.process.is_alive(), "the traffic has ended"


@contextmanager
def traffic(
    pod: LabPod,
    destinations: list[IPAddress],
    steered: Verdict,
    moment: Any,
    *,
    names: bool = False,
) -> Iterator[Traffic]:
    """Connections of a process in `pod`; `moment` says in its lowest two bits what phase it is.

    `names`: getpeername() must answer the destination all the time.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    served = context.Value(ctypes.c_uint64)
    allowed = {
        Phase.FREE: {Verdict.DIRECT},
        Phase.CHANGING: {Verdict.DIRECT, steered},
        Phase.ENROLLED: {steered},
    }

    def check_name(connection: Any, destination: IPAddress, story: str) -> None:
        if names:
            assert connection.getpeername()[:2] == (str(destination), PORT), story

    def call_for_ever() -> None:
        kept: dict[tuple[int, IPAddress], Any] = {}
        while True:
            for destination in destinations:
                before = moment.value
                connection, arrival = probes.connect(probes.Call(destination, PORT))
                story = f"{arrival} for {destination} in {Phase(before & 3).name}"
                assert (arrival.destination, arrival.port) == (destination, PORT), story
                if moment.value == before:
                    assert arrival.verdict in allowed[Phase(before & 3)], story
                check_name(connection, destination, story)
                assert probes.echo(connection, b"new") == b"new", story
                # One of each moment stays, to live through all that follow.
                if kept.setdefault((before, destination), connection) is not connection:
                    connection.close()
            for (opened, destination), connection in kept.items():
                text = os.urandom(100)
                story = f"{destination} of moment {opened} in {moment.value}"
                check_name(connection, destination, story)
                assert probes.echo(connection, text) == text, story
            served.value += 1

    def run() -> None:
        try:
            pod.place().enter()
            call_for_ever()
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}")
        finally:
            os._exit(1)

    process = context.Process(target=run, daemon=True)
    process.start()
    theirs.close()
    try:
        yield Traffic(process, ours, served)
    finally:
        process.kill()
        process.join()
        ours.close()
