"""The bench measures what it says: lean clients get everything and answer each change."""

import json
from pathlib import Path

import pytest
from xds_server.bench import command
from xds_server.bench.clients import Variant
from xds_server.bench.wire import ClientStream, StreamEnded

CLIENTS, SERVICES, ENDPOINTS, ROUNDS = 5, 3, 7, 2


@pytest.mark.parametrize("variant", Variant)
def test_every_client_is_reached(
    variant: Variant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    sizes = {"clients": CLIENTS, "services": SERVICES, "endpoints": ENDPOINTS}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    chosen = [f"--variant={variant}", f"--rounds={ROUNDS}", f"--json={figures}"]
    assert command.main([*options, *chosen]) == 0
    assert f"{CLIENTS} clients" in capsys.readouterr().out
    (result,) = json.loads(figures.read_text())
    moves = result["rounds"]["an endpoint moves"]
    assert [one["clients"] for one in moves] == [CLIENTS] * ROUNDS
    assert [one["clients"] for one in result["rounds"]["a policy is edited"]] == [1] * ROUNDS
    # The message has the changed endpoint's address, and no other service's.
    assert all(0 < one["bytes_each"] < 1000 for one in moves)


def test_a_size_is_given_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--clients", "3"])
    assert "together" in capsys.readouterr().err


def test_a_client_sends_within_the_servers_window() -> None:
    stream = ClientStream("/s/m")
    stream.take_output()
    stream.send(b"x" * 100_000)
    before = len(stream.take_output())
    assert before < 66_000
    more = (100_000).to_bytes(4, "big")
    for number in (0, 1):
        frame = b"\0\0\4\x08\0" + number.to_bytes(4, "big") + more
        assert list(stream.receive(frame)) == []
    assert before + len(stream.take_output()) > 100_000


def test_messages_come_out_whole_however_they_arrive() -> None:
    message = b"\0" + (6).to_bytes(4, "big") + b"abcdef"
    wire = b"".join(
        len(part).to_bytes(3, "big") + b"\0\0\0\0\0\1" + part for part in (message[:7], message[7:])
    )
    stream = ClientStream("/s/m")
    found = [m for at in range(len(wire)) for m in stream.receive(wire[at : at + 1])]
    assert found == [b"abcdef"]
    with pytest.raises(StreamEnded):
        list(stream.receive(b"\0\0\4\x07\0\0\0\0\0" + bytes(4)))
