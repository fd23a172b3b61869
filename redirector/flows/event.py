"""What is told of a connection, as a value; its text and JSON forms. Pure.

The JSON's schema is in docs/operations.md. Tens of thousands of these may be told a second, on the
CPUs that the connections themselves are made on: what many events share is worked out once.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, lru_cache
from typing import NamedTuple

from redirector.datapath.layout import (
    Counter,
    Endpoint,
    EventKind,
    EventRecord,
    FlowFlag,
    FlowKey,
    Side,
    host,
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


REFUSED = "refused"

_SECOND = 10**9


class FlowEvent(NamedTuple):
    """A connection at one moment, as its pod sees it. Bytes are those of the application."""

    what: What
    #: Nanoseconds since 1970, UTC.
    at_ns: int
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

    def text(self) -> str:
        """In one line, without its end."""
        seconds, rest = divmod(self.at_ns, _SECOND)
        decided = self.verdict if self.rule is None else f"{self.verdict} by {self.rule}"
        return (
            f"{_local_time(seconds)}.{rest // 10**6:03} {self.what:7} {self.pod:20} "
            f"{_process(self.comm, self.pid):20} {self.source} -> {self.destination}  {decided}  "
            f"{self._ending()}"
        ).rstrip()

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
    seconds, rest = divmod(event.at_ns, _SECOND)
    return (
        f'{{"event": "{event.what}", "time": "{_utc_time(seconds)}.{rest // 1000:06}Z", '
        f'"pod": {_quoted(event.pod)}, "id": "{event.id:x}", '
        f'"pid": {event.pid or "null"}, "process": {_quoted(event.comm)}, '
        f'"source": "{event.source}", "destination": "{event.destination}", '
        f'"verdict": "{event.verdict}", "rule": {_quoted(event.rule)}, '
        f'"reason": {_quoted(event.reason)}, '
        f'"accelerated": {"true" if event.accelerated else "false"}, '
        f'"bytes_sent": {event.sent}, "bytes_received": {event.received}, '
        f'"bytes_short_circuited": {event.short_circuited}, '
        f'"seconds": {_seconds(event.seconds)}, '
        f'"connect_seconds": {_seconds(event.connect_seconds)}}}'
    )


class Clock:
    """Tells wall-clock time from the kernel's CLOCK_MONOTONIC, in nanoseconds."""

    def __init__(self, wall_ns: int, monotonic_ns: int) -> None:
        self._offset = wall_ns - monotonic_ns

    def at(self, monotonic_ns: int) -> int:
        """Since 1970, UTC."""
        return monotonic_ns + self._offset


def from_event(event: EventRecord, clock: Clock, pods: Mapping[int, str]) -> FlowEvent:
    """`pods` names the pods by their netns cookie; one that is not enrolled any more has none."""
    what, verdict, rule, reason = _decided(event.kind, event.rule, event.reason)
    return FlowEvent(
        what=what,
        at_ns=clock.at(event.at_ns),
        pod=pods.get(event.netns) or _unknown(event.netns),
        id=event.id,
        pid=event.pid or None,
        comm=_comm(event.comm) if event.pid else None,
        source=f"{host(event.client)}:{event.client_port}",
        destination=f"{host(event.server)}:{event.server_port}",
        verdict=verdict,
        rule=rule,
        reason=reason,
        accelerated=event.sides >= (2 if what is What.CLOSE else 1),
        sent=event.sent,
        received=event.received,
        short_circuited=event.redirected,
        seconds=None if what is What.REFUSED else (event.at_ns - event.opened_ns) / 1e9,
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
    what, verdict, rule, reason = _decided(EventKind.OPEN, flow.rule, flow.passed)
    return FlowEvent(
        what=what,
        at_ns=clock.at(flow.opened_ns),
        pod=pods.get(flow.client_netns) or _unknown(flow.client_netns),
        id=flow.id,
        pid=flow.process.pid or None,
        comm=_comm(flow.process.comm) if flow.process.pid else None,
        source=str(Endpoint(ip=key.client, port=key.client_port)),
        destination=str(server),
        verdict=verdict,
        rule=rule,
        reason=reason,
        accelerated=all(flow.socket),
        sent=flow.bytes[Side.CLIENT] + tcp[0],
        received=flow.bytes[Side.SERVER] + tcp[1],
        short_circuited=sum(flow.bytes),
        seconds=(now_ns - flow.opened_ns) / 1e9,
        connect_seconds=None,
    )


def _unknown(netns: int) -> str:
    return f"netns-cookie-{netns}"


@cache
def _decided(kind: int, rule: int, reason: int) -> tuple[What, str, str | None, str | None]:
    """What happened, its verdict, by which rule, and for which reason.

    The reason is the counter's name without what it counts: `passed-unread` is `unread`.
    """
    what = What[EventKind(kind).name]
    why = Counter(reason).name.lower().partition("_")[2].replace("_", "-") if reason else None
    if what is What.REFUSED:
        return what, REFUSED, None, why
    return what, RULES[rule].verdict, RULES[rule].name, why


# Few of these are in use at a time. All are bounded: a client can make up many.


@lru_cache(1024)
def _comm(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")


@lru_cache(1024)
def _quoted(text: str | None) -> str:
    return json.dumps(text)


@lru_cache(1024)
def _process(comm: str | None, pid: int | None) -> str:
    return f"{_visible(comm or '')}[{pid}]" if pid else "-"


@lru_cache(16)
def _utc_time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(16)
def _local_time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%H:%M:%S")


def _seconds(value: float | None) -> str:
    # Not as few digits as will do: finding them is dear.
    return "null" if value is None else f"{value:.9f}"


def _visible(text: str) -> str:
    """What a process calls itself must neither begin a line of its own nor reach the terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
