"""What is told of a connection, as a value; its text and JSON forms. Pure.

The JSON's schema is in docs/operations.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from redirector.datapath.layout import (
    Counter,
    Endpoint,
    Event,
    EventKind,
    FlowFlag,
    FlowKey,
    Process,
    Side,
)
from redirector.datapath.layout import Flow as FlowEntry
from redirector.steering import RULES


class What(StrEnum):
    """What happened to a connection."""

    OPEN = "open"
    CLOSE = "close"
    #: It was never established: nobody listened, or it was given up.
    FAILED = "failed"
    REFUSED = "refused"


_WHAT = {
    EventKind.OPEN: What.OPEN,
    EventKind.CLOSE: What.CLOSE,
    EventKind.FAILED: What.FAILED,
    EventKind.REFUSED: What.REFUSED,
}
REFUSED = "refused"


@dataclass(frozen=True)
class FlowEvent:
    """A connection at one moment, as its pod sees it. Bytes are those of the application."""

    what: What
    time: datetime
    pod: str
    #: The same in all events of a connection, also in those of the pod at its other end.
    id: int
    pid: int | None
    comm: str | None
    source: str
    #: Where the client wanted to go.
    destination: str
    #: A listener of the sidecar's, `direct`, or `refused`.
    verdict: str
    rule: str | None
    #: Why it was refused, or why a direction went to TCP instead of the short-circuit.
    reason: str | None
    #: When it opens: whether this end may be short-circuited; later: whether both ends could.
    accelerated: bool
    sent: int
    received: int
    #: How many of both were moved from socket to socket.
    short_circuited: int
    #: Seconds since its SYN; None when it was refused.
    seconds: float | None
    #: Seconds from its SYN until it was established, where the pod opened it.
    connect_seconds: float | None

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "event": self.what.value,
            "time": self.time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "pod": self.pod,
            "id": f"{self.id:x}",
            "pid": self.pid,
            "process": self.comm,
            "source": self.source,
            "destination": self.destination,
            "verdict": self.verdict,
            "rule": self.rule,
            "reason": self.reason,
            "accelerated": self.accelerated,
            "bytes_sent": self.sent,
            "bytes_received": self.received,
            "bytes_short_circuited": self.short_circuited,
            "seconds": self.seconds,
            "connect_seconds": self.connect_seconds,
        }

    def text(self) -> str:
        """In one line, without its end."""
        process = f"{_visible(self.comm or '')}[{self.pid}]" if self.pid else "-"
        decided = self.verdict if self.rule is None else f"{self.verdict} by {self.rule}"
        local = self.time.astimezone()
        words = [
            local.strftime("%H:%M:%S.") + f"{local.microsecond // 1000:03}",
            f"{self.what:7}",
            f"{self.pod:20}",
            f"{process:20}",
            f"{self.source} -> {self.destination}",
            f" {decided}",
            f" {self._ending()}",
        ]
        return " ".join(words).rstrip()

    def _ending(self) -> str:
        if self.what is What.REFUSED:
            return str(self.reason)
        if self.what is What.FAILED:
            return f"never established, {self.seconds:.3f} s"
        why = f" ({self.reason})" if self.reason else ""
        way = "short-circuit" if self.accelerated else f"TCP{why}"
        if self.what is What.OPEN:
            took = f", {self.connect_seconds * 1e6:.0f} µs" if self.connect_seconds else ""
            return way + took
        if self.accelerated:
            way = f"{self.short_circuited:,} of them short-circuited{why}"
        return f"sent {self.sent:,}, received {self.received:,}, {way}, {self.seconds:.3f} s"


def to_line(event: FlowEvent) -> str:
    """Its JSON, in one line without its end."""
    return json.dumps(event.json())


class Clock:
    """Tells wall-clock time from the kernel's CLOCK_MONOTONIC, in nanoseconds."""

    def __init__(self, wall_ns: int, monotonic_ns: int) -> None:
        self._offset = wall_ns - monotonic_ns

    def at(self, monotonic_ns: int) -> datetime:
        """The time of day, UTC."""
        return datetime.fromtimestamp((monotonic_ns + self._offset) / 1e9, UTC)


def from_event(event: Event, clock: Clock, pods: Mapping[int, str]) -> FlowEvent:
    """`pods` names the pods by their netns cookie; one that is not enrolled any more has none."""
    what = _WHAT[EventKind(event.kind)]
    refused = what is What.REFUSED
    return FlowEvent(
        what=what,
        time=clock.at(event.at_ns),
        pod=pods.get(event.netns, f"netns-cookie-{event.netns}"),
        id=event.id,
        pid=_pid(event.process),
        comm=_comm(event.process),
        source=str(event.client),
        destination=str(event.server),
        verdict=REFUSED if refused else RULES[event.rule].verdict,
        rule=None if refused else RULES[event.rule].name,
        reason=_reason(event.reason),
        accelerated=event.sides >= (2 if what is What.CLOSE else 1),
        sent=event.sent,
        received=event.received,
        short_circuited=event.redirected,
        seconds=None if refused else (event.at_ns - event.opened_ns) / 1e9,
        connect_seconds=event.connect_us / 1e6 if event.connect_us else None,
    )


def from_flow(
    key: FlowKey,
    flow: FlowEntry,
    now_ns: int,
    clock: Clock,
    pods: Mapping[int, str],
    tcp: tuple[int, int] = (0, 0),
) -> FlowEvent:
    """A connection that is open now; `tcp` are the bytes that went and came by TCP."""
    steered = flow.flags & FlowFlag.STEERED
    server = flow.original if steered else Endpoint(ip=key.server, port=key.server_port)
    return FlowEvent(
        what=What.OPEN,
        time=clock.at(flow.opened_ns),
        pod=pods.get(flow.client_netns, f"netns-cookie-{flow.client_netns}"),
        id=flow.id,
        pid=_pid(flow.process),
        comm=_comm(flow.process),
        source=str(Endpoint(ip=key.client, port=key.client_port)),
        destination=str(server),
        verdict=RULES[flow.rule].verdict,
        rule=RULES[flow.rule].name,
        reason=_reason(flow.passed),
        accelerated=all(flow.socket),
        sent=flow.bytes[Side.CLIENT] + tcp[0],
        received=flow.bytes[Side.SERVER] + tcp[1],
        short_circuited=sum(flow.bytes),
        seconds=(now_ns - flow.opened_ns) / 1e9,
        connect_seconds=None,
    )


def _pid(process: Process) -> int | None:
    return process.pid or None


def _comm(process: Process) -> str | None:
    return process.comm.decode(errors="replace") if process.pid else None


def _visible(text: str) -> str:
    """What a process calls itself must neither begin a line of its own nor reach the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _reason(counter: int) -> str | None:
    """The counter's name without what it counts: `passed-unread` is `unread`."""
    return Counter(counter).name.lower().partition("_")[2].replace("_", "-") if counter else None
