"""The HTTP endpoint: pages that are whole, and pages that are made while they are sent."""

import http.client
import socket

import pytest

from redirector.serving import Page, Server

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
