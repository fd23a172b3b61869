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
from redirector.datapath.layout import Event
from redirector.datapath.maps import OpenFlow
from redirector.enrollment import Enrollment
from redirector.errors import DatapathError, InputError, RedirectorError
from redirector.flows.event import Clock, FlowEvent, from_event, from_flow, to_line
from redirector.model import Mode, Pod

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
    _require_visible(enrollment, arguments.pod)
    show = to_line if arguments.output == "json" else FlowEvent.text
    if not arguments.follow:
        for event in open_now(enrollment, arguments.pod):
            print(show(event), file=out)
        return 0
    with _stopping() as stopping:
        _follow(enrollment, arguments.pod, show, out, stopping)
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


def _require_visible(enrollment: Enrollment, name: str | None) -> None:
    """InputError when the pod is not enrolled or not in eBPF mode; says which are not shown."""
    if name is not None:
        if enrollment.get(name).mode is Mode.IPTABLES:
            raise InputError(
                f"pod {name}: is in iptables mode, in which no program sees its connections; "
                f"'redirector status' counts them, 'redirector mode {name} ebpf' shows them"
            )
        return
    unseen = [pod.name for pod in enrollment.pods() if pod.mode is Mode.IPTABLES]
    if unseen:
        print(
            f"redirector: pods in iptables mode are not shown: {', '.join(unseen)}",
            file=sys.stderr,
        )


def open_now(enrollment: Enrollment, name: str | None = None) -> Iterator[FlowEvent]:
    """The open connections that are steered or may be short-circuited, oldest first."""
    datapath = enrollment.datapath
    if not datapath.is_loaded():
        return
    pods = {pod.netns_cookie: pod for pod in enrollment.pods()}
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
        tcp = traffic[netns].get(_ends(found), (0, 0))
        yield from_flow(found.key, found.flow, now, clock, names, tcp)


def _traffic(pod: Pod | None) -> tcp_diag.Traffic:
    # What was short-circuited is told all the same when the namespace cannot be asked.
    if pod is not None:
        with contextlib.suppress(RedirectorError):
            return network.within(pod.netns, tcp_diag.traffic)
    return {}


def _ends(found: OpenFlow) -> tcp_diag.Ends:
    key = found.key
    return key.client.ip(), key.client_port, key.server.ip(), key.server_port


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
            self.names |= {pod.netns_cookie: pod.name for pod in self._enrollment.pods()}


def _follow(
    enrollment: Enrollment,
    name: str | None,
    show: Callable[[FlowEvent], str],
    out: TextIO,
    stopping: Callable[[], bool],
) -> None:
    names = _Names(enrollment)

    def write(events: list[Event], lost: int) -> None:
        if events:
            names.refresh()
        clock = Clock(time.time_ns(), time.monotonic_ns())
        for event in events:
            told = from_event(event, clock, names.names)
            if name is None or told.pod == name:
                print(show(told), file=out)
        if lost:
            print(_lost(lost, show), file=out)
        if events or lost:
            out.flush()

    while not stopping():
        # No pod may be in eBPF mode yet, and another version may take over.
        followers = enrollment.datapath.followers()
        if followers is None:
            time.sleep(PERIOD)
            continue
        with followers.follow() as follower:
            try:
                while not stopping() and enrollment.datapath.followers() == followers:
                    _read(follower, write, stopping)
            finally:
                with contextlib.suppress(DatapathError):
                    write(follower.read(), follower.lost())


def _read(
    follower: Follower,
    write: Callable[[list[Event], int], None],
    stopping: Callable[[], bool],
) -> None:
    """For a while."""
    due = time.monotonic() + CHECKS
    while time.monotonic() < due and not stopping():
        events = follower.read()
        if events:
            write(events, 0)
        else:
            time.sleep(PERIOD)
    write([], follower.lost())


def _lost(count: int, show: Callable[[FlowEvent], str]) -> str:
    if show is to_line:
        return json.dumps({"event": "lost", "count": count})
    return f"-- {count} events lost: they came faster than they were read"
