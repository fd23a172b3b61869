"""A connection in one line, as text and as JSON, whatever its process calls itself."""

import json
from ipaddress import ip_address

import pytest

from redirector.datapath.layout import (
    Counter,
    EventKind,
    EventRecord,
    mapped,
)
from redirector.flows.event import Clock, FlowEvent, What, from_event, to_line
from redirector.steering import RULES

#: 2026-01-02 03:04:05.006007008 UTC.
AT_NS = 1_767_323_045_006_007_008
NETNS = 4711
RECORD = EventRecord(
    at_ns=2_500_000_000,
    opened_ns=2_000_000_000,
    id=0xABC,
    netns=NETNS,
    sent=120,
    received=16_400,
    redirected=1200,
    client=mapped(ip_address("10.0.0.5")),
    client_port=40_000,
    server=mapped(ip_address("fd96::1")),
    server_port=80,
    pid=7,
    comm=b'cu"rl\xff\0left over',
    connect_us=64,
    flags=0,
    rule=next(n for n, rule in enumerate(RULES) if rule.name == "outbound.included-cidr"),
    kind=EventKind.CLOSE,
    reason=Counter.PASSED_UNREAD,
    sides=2,
)


def told(record: EventRecord) -> FlowEvent:
    return from_event(record, Clock(AT_NS, 2_500_000_000), {NETNS: "demo/web"})


def test_json_tells_everything() -> None:
    assert json.loads(to_line(told(RECORD))) == {
        "event": "close",
        "time": "2026-01-02T03:04:05.006007Z",
        "pod": "demo/web",
        "id": "abc",
        "pid": 7,
        "process": 'cu"rl\ufffd',
        "source": "10.0.0.5:40000",
        "destination": "[fd96::1]:80",
        "verdict": "outbound",
        "rule": "outbound.included-cidr",
        "reason": "unread",
        "accelerated": True,
        "bytes_sent": 120,
        "bytes_received": 16400,
        "bytes_short_circuited": 1200,
        "seconds": 0.5,
        "connect_seconds": 6.4e-05,
    }


def test_json_tells_what_is_not_known_as_null() -> None:
    record = RECORD._replace(
        kind=EventKind.REFUSED, reason=Counter.REFUSED_NO_FLOW, pid=0, connect_us=0, netns=1
    )
    event = json.loads(to_line(told(record)))
    assert {key for key, value in event.items() if value is None} == {
        "pid",
        "process",
        "rule",
        "seconds",
        "connect_seconds",
    }
    assert (event["pod"], event["verdict"]) == ("netns-cookie-1", "refused")
    assert event["reason"] == "no-flow"


@pytest.mark.parametrize(
    ("change", "ending"),
    [
        (
            {},
            "outbound by outbound.included-cidr  "
            "sent 120, received 16,400, 1,200 of them short-circuited (unread), 0.500 s",
        ),
        ({"kind": EventKind.OPEN, "reason": 0}, "short-circuit, 64 µs"),
        ({"kind": EventKind.OPEN, "sides": 0}, "TCP (unread), 64 µs"),
        ({"kind": EventKind.FAILED}, "never established, 0.500 s"),
        ({"kind": EventKind.REFUSED, "reason": Counter.REFUSED_NO_FLOW}, "refused  no-flow"),
    ],
)
def test_text_tells_how_it_went(change: dict[str, int], ending: str) -> None:
    line = told(RECORD._replace(**change)).text()
    assert line[6:12] == "05.006"
    assert f" {'demo/web':20} " in line
    assert " 10.0.0.5:40000 -> [fd96::1]:80  " in line
    assert line.endswith(f"  {ending}")


@pytest.mark.parametrize(
    ("comm", "shown"),
    [
        ("nginx: worker", "nginx: worker[7]"),
        ("café→日本", "café→日本[7]"),
        ("a\nopen evil", r"a\x0aopen evil[7]"),
        ("\x1b]0;x\x07\r", r"\x1b]0;x\x07\x0d[7]"),
        ("\x9b31m\u2028", r"\x9b31m\x2028[7]"),
        ("", "[7]"),
    ],
)
def test_a_program_writes_no_line_of_its_own(comm: str, shown: str) -> None:
    event = told(RECORD)._replace(what=What.OPEN, comm=comm)
    (line,) = event.text().splitlines()
    assert f" {shown}" in line
    assert line.isprintable()
    (line,) = to_line(event).splitlines()
    assert line.isprintable()
    assert json.loads(line)["process"] == comm
