"""The HTTP endpoint: pages that are whole, and pages that are made while they are sent."""

import http.client
import socket
import threading
from contextlib import ExitStack

import pytest
from waiting import eventually

from redirector import serving
from redirector.serving import MAX_CONNECTIONS, Page, Server

PIECES = [b"first\n", b"", b"x" * 100_000, b"last\n"]


@pytest.fixture
def server() -> Server:
    made = Server(
        "127.0.0.1:0",
        {"/whole": lambda: Page(200, b"".join(PIECES)), "/pieces": lambda: Page(200, iter(PIECES))},
    )
    made.start()
    return made


@pytest.mark.parametrize("path", ["/whole", "/pieces"])
def test_pages_follow_each_other_on_one_connection(server: Server, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(2):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"".join(PIECES))
    connection.close()


@pytest.mark.parametrize("path", ["/whole", "/pieces"])
def test_a_client_of_http_1_0_reads_to_the_end(server: Server, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert body == b"".join(PIECES)


def test_what_is_not_there_names_what_is(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/elsewhere")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (404, b"there are: /whole /pieces\n")
    connection.close()


@pytest.mark.parametrize(
    ("kernel", "hosts"), [(True, ["127.0.0.1", "::1"]), (False, ["127.0.0.1"])]
)
def test_every_address_of_the_families_that_the_kernel_has(
    kernel: bool, hosts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: kernel)
    made = Server("[::]:0", {"/whole": lambda: Page(200, b"x")})
    made.start()
    for host in ("127.0.0.1", "::1"):
        connection = http.client.HTTPConnection(host, made.port, timeout=10)
        if host in hosts:
            connection.request("GET", "/whole")
            assert connection.getresponse().read() == b"x"
        else:
            with pytest.raises(ConnectionRefusedError):
                connection.connect()
        connection.close()


@pytest.mark.parametrize(
    "said", [b"", b"GET /whole HTT", b"GET /pieces HTTP/1.1\r\n\r\n" * 100], ids=len
)
def test_who_says_nothing_or_takes_nothing_keeps_nobody_from_being_answered(
    server: Server, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving._Handler, "timeout", 3600)
    before = threading.active_count()
    with ExitStack() as idle:
        for _ in range(500):
            made = idle.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            made.sendall(said)
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request("GET", "/whole")
            assert connection.getresponse().read() == b"".join(PIECES)
            connection.close()
        eventually("room", lambda: threading.active_count() - before <= MAX_CONNECTIONS)
    eventually("their end", lambda: threading.active_count() <= before)
