"""A connection in one line, whatever its process calls itself."""

from datetime import UTC, datetime

import pytest

from redirector.flows.event import FlowEvent, What


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
    event = FlowEvent(
        what=What.OPEN,
        time=datetime(2026, 1, 2, tzinfo=UTC),
        pod="demo/web",
        id=1,
        pid=7,
        comm=comm,
        source="10.0.0.5:1",
        destination="10.96.0.1:80",
        verdict="outbound",
        rule="outbound.included-cidr",
        reason=None,
        accelerated=True,
        sent=0,
        received=0,
        short_circuited=0,
        seconds=0.1,
        connect_seconds=None,
    )
    (line,) = event.text().splitlines()
    assert f" {shown}" in line
    assert line.isprintable()
    assert event.json()["process"] == comm
