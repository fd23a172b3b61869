"""Where the server may listen, and what it says when it may not."""

import socket
from pathlib import Path

import pytest
from xds_server.listen import (
    TcpAddress,
    UnixAddress,
    claim,
    open_to_sidecars,
    parse,
)

from redirector.errors import InputError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:18000", TcpAddress("127.0.0.1", 18000)),
        ("127.9.9.9:1", TcpAddress("127.9.9.9", 1)),
        ("localhost:18000", TcpAddress("localhost", 18000)),
        ("[::1]:18000", TcpAddress("::1", 18000)),
        ("127.0.0.1:0", TcpAddress("127.0.0.1", 0)),
        ("unix:/run/xds.sock", UnixAddress(Path("/run/xds.sock"))),
        ("unix:///run/xds.sock", UnixAddress(Path("/run/xds.sock"))),
    ],
)
def test_address_is_read(text: str, address: object) -> None:
    assert parse(text) == address


def test_every_address_of_a_kernel_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("[::]:1", encrypted=True) == TcpAddress("::", 1)
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    assert parse("[::]:1", encrypted=True) == TcpAddress("0.0.0.0", 1)


@pytest.mark.parametrize("text", ["[::1]:18000", "127.0.0.1:18000", "unix:/run/xds.sock"])
def test_address_is_shown_as_it_is_given(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "18000",
        ":18000",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:65536",
        "127.0.0.1:http",
        "::1:18000",
        "[127.0.0.1]:18000",
        "example.com:18000",
        "unix:",
        "unix:run/x",
        "unix:/run/",
        "unix://run/x",
        "127.0.0.1:１８",
    ],
)
def test_address_that_is_none_is_named_with_the_way_out(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse(text)
    assert str(error.value).startswith(f"--listen {text}: not an address; use ")


@pytest.mark.parametrize("text", ["0.0.0.0:18000", "[::]:18000", "10.0.0.1:18000"])
def test_plaintext_off_loopback_needs_to_be_asked_for(text: str) -> None:
    with pytest.raises(InputError, match="--insecure-listen"):
        parse(text)
    assert str(parse(text, insecure=True)) == text


def test_socket_path_that_the_kernel_cannot_hold() -> None:
    with pytest.raises(InputError, match="at most 107 bytes"):
        parse("unix:/" + "x" * 107)


def test_busy_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with pytest.raises(InputError, match=f"--listen 127.0.0.1:{port}: Address already in use"):
            claim(TcpAddress("127.0.0.1", port))
    claim(TcpAddress("127.0.0.1", port))


def test_living_servers_socket_is_left_alone_and_a_dead_ones_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "xds.sock"
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))
        held.listen()
        with pytest.raises(InputError, match="another server listens there"):
            claim(UnixAddress(path))
        assert path.exists()
    claim(UnixAddress(path))
    assert not path.exists()


def test_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("dear diary")
    with pytest.raises(InputError, match="exists and is no socket"):
        claim(UnixAddress(path))
    assert path.read_text() == "dear diary"


def test_folder_is_made_for_others_to_enter(tmp_path: Path) -> None:
    claim(UnixAddress(tmp_path / "run" / "xds.sock"))
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


def test_every_user_may_connect_and_closed_folders_are_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    path = closed / "xds.sock"
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))
        assert open_to_sidecars(path) == closed
        assert path.stat().st_mode & 0o777 == 0o666
