"""Connections made all the time, some of them kept for ever, from a process of a pod."""

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import ip_address
from typing import Any

import probes
from waiting import eventually

from redirector.lab import LabPod, Node
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


def flow(*sides: Traffic, rounds: int = 3) -> None:
    """Until each side has opened new ones and used all its open ones that often."""
    before = [each.served.value for each in sides]

    def flowed() -> bool:
        for each in sides:
            each.check()
        return all(
            each.served.value >= then + rounds for each, then in zip(sides, before, strict=True)
        )

    eventually("traffic", flowed)


@contextmanager
def working(
    pod: LabPod, rounds: Callable[[], Iterator[None]], gid: int | None = None
) -> Iterator[Traffic]:
    """A process of the pod that goes through `rounds`, which never end, until leaving."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    served = context.Value(ctypes.c_uint64)

    def run() -> None:
        try:
            pod.place(gid=gid).enter()
            for _ in rounds():
                served.value += 1
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
    allowed = {
        Phase.FREE: {Verdict.DIRECT},
        Phase.CHANGING: {Verdict.DIRECT, steered},
        Phase.ENROLLED: {steered},
    }

    def check_name(connection: Any, destination: IPAddress, story: str) -> None:
        if names:
            assert connection.getpeername()[:2] == (str(destination), PORT), story

    def calls() -> Iterator[None]:
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
            yield

    with working(pod, calls) as made:
        yield made


@dataclass(frozen=True)
class Busy:
    """A pod under traffic from and to it."""

    pod: LabPod
    flows: tuple[Traffic, Traffic]
    moment: Any

    def enter(self, phase: Phase) -> None:
        """Say where connections may arrive from now on; of each moment new ones are kept."""
        self.moment.value = ((self.moment.value >> 2) + 1) << 2 | phase

    def flow(self) -> None:
        """Until there was new traffic in both directions."""
        flow(*self.flows)


def busy_pods(node: Node) -> tuple[LabPod, LabPod]:
    """A pod with sidecar and application, and a peer with an application."""
    pod, peer = node.pod("pod"), node.pod("peer")
    probes.start(pod, [(Verdict.OUTBOUND, 15001), (Verdict.INBOUND, 15006)], sidecar=True)
    for each in (pod, peer):
        probes.start(each, [(Verdict.DIRECT, PORT)])
    return pod, peer


@contextmanager
def both_ways(pod: LabPod, peer: LabPod, phase: Phase, *, names: bool = False) -> Iterator[Busy]:
    """Traffic from the pod to the peer and back, by IPv4 and IPv6."""
    moment = multiprocessing.get_context("fork").Value(ctypes.c_uint64, phase)
    with (
        traffic(pod, _addresses(peer), Verdict.OUTBOUND, moment, names=names) as outbound,
        traffic(peer, _addresses(pod), Verdict.INBOUND, moment, names=names) as inbound,
    ):
        yield Busy(pod, (outbound, inbound), moment)


def _addresses(pod: LabPod) -> list[IPAddress]:
    return [ip_address(pod.ip), ip_address(pod.ip6)]
