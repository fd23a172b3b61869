"""docs/operations.md names what an operator may meet: metrics, reasons, the keys of an event."""

import json
from pathlib import Path

import pytest
from xds_server.admission import Reason
from xds_server.generation import Generation
from xds_server.server import Server

from redirector import metrics
from redirector.datapath.layout import Counter
from redirector.flows.event import FlowEvent, What, to_line
from redirector.status import NodeStatus

PAGE = (Path(__file__).resolve().parents[2] / "docs/operations.md").read_text()
EVENT = FlowEvent(
    what=What.REFUSED,
    at_ns=0,
    pod="pod",
    id=1,
    pid=None,
    comm=None,
    source="10.0.0.1:1",
    destination="10.0.0.2:2",
    verdict="refused",
    rule=None,
    reason="no-flow",
    accelerated=False,
    sent=0,
    received=0,
    short_circuited=0,
    seconds=None,
    connect_seconds=None,
)


def test_every_metric_is_listed() -> None:
    total = {"counter": "_total"}
    names = {f"{one.name}{total.get(one.type, '')}" for one in metrics.families(NodeStatus(()))}
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE] == []


async def test_every_metric_of_the_xds_server_is_listed() -> None:
    """A server is made in a loop, whatever ran before."""
    server = Server(Generation(lambda _: {}), report=lambda _: None)
    lines = server.metrics().decode().splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    assert len(names) > 5
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE] == []
    assert [reason for reason in Reason if f"`{reason}`" not in PAGE] == []


@pytest.mark.parametrize("outcome", ["PASSED", "REFUSED"])
def test_every_reason_is_explained(outcome: str) -> None:
    reasons = [c.name.partition("_")[2] for c in Counter if c.name.startswith(f"{outcome}_")]
    rows = [f"| `{reason.lower().replace('_', '-')}` |" for reason in reasons]
    assert rows
    assert [row for row in rows if row not in PAGE] == []


def test_every_key_of_an_event_is_in_the_schema() -> None:
    assert [key for key in json.loads(to_line(EVENT)) if f"`{key}`" not in PAGE] == []
