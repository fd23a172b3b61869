"""`redirector flows`: what is open now, or each connection as it opens and closes."""

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from redirector import network, tcp_diag
from redirector.datapath.followers import Follower
from redirector.enrollment import Enrollment
from redirector.errors import DatapathError, InputError, RedirectorError
from redirector.flows.event import Clock, FlowEvent, from_event, from_flow, to_line
from redirector.model import Mode, Pod
from redirector.modes.ebpf import pin_name

#: How often the ring buffer is looked into, in seconds: programs do not wake who waits.
PERIOD = 0.1
#: How often it is asked whether events were lost and whether the programs are still the same.
CHECKS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `redirector flows`."""
    parser.add_argument(
        "--follow", action="store_true", help="print connections as they open and close, until ^C"
    )
    parser.add_argument("--pod", metavar="NAME", help="only this pod's")
    parser.add_argument(
        "-o",
        "--output",
        choices=("text", "json"),
        default="text",
        help="json: an object a line (default: %(default)s)",
    )


def run(arguments: argparse.Namespace, enrollment: Enrollment, out: TextIO) -> int:
    """Print until there is no more, or until interrupted; the exit code."""
    if arguments.pod is not None:
        enrollment.get(arguments.pod)
    unseen = _Unseen(enrollment, arguments.pod)
    unseen.say()
    show = to_line if arguments.output == "json" else FlowEvent.text
    if not arguments.follow:
        for event in open_now(enrollment, arguments.pod):
            print(show(event), file=out)
        return 0
    with _stopping() as stopping:
        _follow(enrollment, unseen, arguments.pod, show, out, stopping)
    return 0


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Tells whether a signal has asked to end.

    An exception out of a signal handler could end in libbpf's callback, which swallows it.
    """
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Unseen:
    """The pods whose connections cannot be told, and why; says so once of each, on stderr."""

    def __init__(self, enrollment: Enrollment, name: str | None) -> None:
        self._enrollment = enrollment
        self._name = name
        self._said: set[tuple[str, str]] = set()
        self._seen: tuple[int, int] | None = None
        self._due: float | None = None

    def look(self) -> None:
        """`say`, when pods or programs have changed and have then been left alone for a while."""
        seen = (self._enrollment.version(), len(self._enrollment.datapath.others()))
        if seen != self._seen:
            self._seen, self._due = seen, time.monotonic() + CHECKS
        elif self._due is not None and time.monotonic() > self._due:
            self._due = None
            self.say()

    def say(self) -> None:
        """Name those that were not named yet. InputError when it is the one that was asked for."""
        found: dict[str, list[str]] = {}
        for pod in self._enrollment.readable():
            why = self._why(pod)
            if why is None:
                continue
            if pod.name == self._name:
                raise InputError(f"pod {pod.name}: is {why}")
            if self._name is None and (pod.name, why) not in self._said:
                self._said.add((pod.name, why))
                found.setdefault(why, []).append(pod.name)
        for why, names in found.items():
            print(f"redirector: not shown, {why}: {', '.join(names)}", file=sys.stderr, flush=True)

    def _why(self, pod: Pod) -> str | None:
        if pod.mode is Mode.IPTABLES:
            return "in iptables mode, where 'redirector status' counts connections"
        datapath = self._enrollment.datapath
        if datapath.is_loaded() and datapath.decides(pin_name(pod.name)):
            return None
        if datapath.others():
            return "steered by another version's programs until 'redirector takeover'"
        return "not steered by any program; see 'redirector status'"


def open_now(enrollment: Enrollment, name: str | None = None) -> Iterator[FlowEvent]:
    """The open connections that are steered or may be short-circuited, oldest first."""
    datapath = enrollment.datapath
    if not datapath.is_loaded():
        return
    pods = {pod.netns_cookie: pod for pod in enrollment.readable()}
    names = {cookie: pod.name for cookie, pod in pods.items()}
    now = time.monotonic_ns()
    clock = Clock(time.time_ns(), now)
    traffic: dict[int, tcp_diag.Traffic] = {}
    for found in sorted(datapath.maps.flows(), key=lambda found: found.flow.opened_ns):
        netns = found.flow.client_netns
        if name is not None and names.get(netns) != name:
            continue
        if netns not in traffic:
            traffic[netns] = _traffic(pods.get(netns))
        tcp = traffic[netns].get(found.key.ends, (0, 0))
        yield from_flow(found.key, found.flow, now, clock, names, tcp)


def _traffic(pod: Pod | None) -> tcp_diag.Traffic:
    # What was short-circuited is told all the same when the namespace cannot be asked.
    if pod is not None:
        with contextlib.suppress(RedirectorError):
            return network.within(pod.netns, tcp_diag.traffic)
    return {}


class _Names:
    """Pods by their netns cookie, read again when a record has changed; remembers who is gone."""

    def __init__(self, enrollment: Enrollment) -> None:
        self._enrollment = enrollment
        self._version = -1
        self.names: dict[int, str] = {}

    def refresh(self) -> None:
        version = self._enrollment.version()
        if version != self._version:
            self._version = version
            self.names |= {pod.netns_cookie: pod.name for pod in self._enrollment.readable()}


def _follow(
    enrollment: Enrollment,
    unseen: _Unseen,
    name: str | None,
    show: Callable[[FlowEvent], str],
    out: TextIO,
    stopping: Callable[[], bool],
) -> None:
    names = _Names(enrollment)

    def write(follower: Follower) -> None:
        for events in follower.read():
            # Only now: a pod may have come just before its first event.
            names.refresh()
            clock = Clock(time.time_ns(), time.monotonic_ns())
            told = (from_event(event, clock, names.names) for event in events)
            lines = [show(event) for event in told if name is None or event.pod == name]
            out.write("".join(f"{line}\n" for line in lines))
            out.flush()

    def write_lost(follower: Follower) -> None:
        lost = follower.lost()
        if lost:
            print(_lost(lost, show), file=out, flush=True)

    while not stopping():
        # No pod may be in eBPF mode yet, and another version may take over.
        followers = enrollment.datapath.followers()
        unseen.look()
        if followers is None:
            time.sleep(PERIOD)
            continue
        try:
            with followers.follow() as follower:
                while not stopping() and enrollment.datapath.followers() == followers:
                    due = time.monotonic() + CHECKS
                    while time.monotonic() < due and not stopping():
                        write(follower)
                        time.sleep(PERIOD)
                    write_lost(follower)
                    unseen.look()
                write(follower)
                write_lost(follower)
        except DatapathError:
            # Not when the programs have gone just now.
            if enrollment.datapath.followers() == followers:
                raise


def _lost(count: int, show: Callable[[FlowEvent], str]) -> str:
    if show is to_line:
        return json.dumps({"event": "lost", "count": count})
    return f"-- {count} events lost: they came faster than they were read"
