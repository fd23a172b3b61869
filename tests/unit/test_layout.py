"""The structs that programs build on their stacks."""

import ctypes
import struct

import pytest

from redirector.datapath.layout import STRUCTS, Event, EventRecord, Struct, packed


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.c_name)
def test_every_byte_is_a_fields(struct: type[Struct]) -> None:
    """An initializer leaves padding unset, and kernels before 6.3 refuse to hand that on."""
    assert sum(ctypes.sizeof(field[1]) for field in struct._fields_) == ctypes.sizeof(struct)


def test_an_event_unpacks_into_its_members() -> None:
    event = Event(
        at_ns=1, opened_ns=2, id=3, netns=4, sent=5, received=6, redirected=7, connect_us=8,
        flags=9, rule=10, kind=11, reason=12, sides=13, pad=99,
    )  # fmt: skip
    event.client.ip.word[3], event.client.port, event.client.pad = 1, 14, 99
    event.server.ip.word[3], event.server.port = 2, 15
    event.process.pid, event.process.comm = 16, b"curl"
    record = EventRecord._make(struct.unpack(f"={packed(Event)}", bytes(event)))
    for name in ("at_ns", "opened_ns", "id", "netns", "sent", "received", "redirected"):
        assert getattr(record, name) == getattr(event, name)
    for name in ("connect_us", "flags", "rule", "kind", "reason", "sides"):
        assert getattr(record, name) == getattr(event, name)
    assert (record.client, record.client_port) == (bytes(event.client.ip), 14)
    assert (record.server, record.server_port) == (bytes(event.server.ip), 15)
    assert (record.pid, record.comm) == (16, b"curl" + bytes(12))
