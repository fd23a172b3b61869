"""A small HTTP endpoint for who looks after a program: /metrics, /healthz, /readyz."""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from redirector.errors import InputError

#: A scraper that sends nothing, or does not take its answer, is let go after so many seconds.
_PATIENCE = 10.0
#: Connections at a time. One more takes the place of the one that has waited longest.
MAX_CONNECTIONS = 64


@dataclass(frozen=True)
class Page:
    """An answer."""

    status: int
    #: Whole, or in pieces that are made while they are sent.
    body: bytes | Iterable[bytes]
    content_type: str = "text/plain; charset=utf-8"


class Server:
    """Serves pages in threads that end with the process."""

    def __init__(
        self, address: str, pages: Mapping[str, Callable[[], Page]], option: str = "--metrics"
    ) -> None:
        """`address` is HOST:PORT or [V6]:PORT, as `option` gave it; [::] stands for every address
        of both families. InputError when it cannot be listened on."""
        host, port = _split(address, option)
        host = every_address(host)

        class Handler(_Handler):
            answers = pages

        class Listener(_Listener):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._listener = Listener((host, port), Handler)
        except OSError as error:
            raise InputError(
                f"{option} {address}: {error.strerror or error}; choose another address"
            ) from None
        self.port: int = self._listener.server_address[1]

    def start(self) -> None:
        """Begin to answer."""
        threading.Thread(target=self._listener.serve_forever, name="http", daemon=True).start()


def every_address(host: str) -> str:
    """`::` is every address of both families; where the kernel has no IPv6, it is 0.0.0.0."""
    return "0.0.0.0" if host == "::" and not socket.has_dualstack_ipv6() else host


class _Listener(ThreadingHTTPServer):
    """A thread for each connection, and a bound on these: anybody may connect, and who says
    nothing, or says it slowly, must not keep others from being answered."""

    daemon_threads = True
    #: Who comes while a crowd does is not to try again a second later, as TCP would.
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._lock = threading.Lock()
        #: In the order in which they began to wait for a request, and to be answered.
        self._waiting: dict[socket.socket, None] = {}
        self._answering: dict[socket.socket, None] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._waiting) + len(self._answering) >= MAX_CONNECTIONS:
                last = self._waiting or self._answering
                self._let_go(next(iter(last)))
            self._waiting[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._forget(request)
        super().shutdown_request(request)

    @contextmanager
    def answering(self, connection: socket.socket) -> Iterator[None]:
        """While a request is being answered, others that only wait go first."""
        self._move(connection, self._waiting, self._answering)
        try:
            yield
        finally:
            self._move(connection, self._answering, self._waiting)

    def _move(
        self,
        connection: socket.socket,
        before: dict[socket.socket, None],
        after: dict[socket.socket, None],
    ) -> None:
        with self._lock:
            # One that was let go is in neither.
            if connection in before:
                del before[connection]
                after[connection] = None

    def _let_go(self, connection: socket.socket) -> None:
        """Its thread finds the end of it, and closes it."""
        self._forget(connection)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _forget(self, connection: socket.socket) -> None:
        self._waiting.pop(connection, None)
        self._answering.pop(connection, None)

    def server_bind(self) -> None:
        """Without HTTPServer's own, which asks DNS for our name and waits for it."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    answers: Mapping[str, Callable[[], Page]] = {}
    timeout = _PATIENCE
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "redirector", ""

    def do_GET(self) -> None:
        assert isinstance(self.server, _Listener)
        with self.server.answering(self.connection):
            self._answer()

    def _answer(self) -> None:
        answer = self.answers.get(self.path.partition("?")[0])
        page = answer() if answer else Page(404, f"there are: {' '.join(self.answers)}\n".encode())
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        if isinstance(page.body, bytes):
            self.send_header("Content-Length", str(len(page.body)))
            self.end_headers()
            self.wfile.write(page.body)
        else:
            self._send_pieces(page.body)

    def _send_pieces(self, pieces: Iterable[bytes]) -> None:
        """In chunks (RFC 9112, 7.1); to a client of HTTP/1.0, until the connection ends."""
        chunked = self.request_version != "HTTP/1.0"
        end = ("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")
        self.send_header(*end)
        self.end_headers()
        for piece in pieces:
            # An empty chunk would be the last.
            if chunked and piece:
                piece = b"%x\r\n%b\r\n" % (len(piece), piece)
            self.wfile.write(piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not changes: the log has only those."""


def _split(address: str, option: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if bracketed != (":" in host) or not (
        port.isascii() and port.isdecimal() and int(port) <= 65535
    ):
        raise InputError(f"{option} {address}: is not HOST:PORT or [V6]:PORT")
    return host, int(port)
