"""One Envoy, given listeners of several sidecars, and the applications behind it.

The listeners are moved to addresses of a loopback network of the test's own, so that a connection's
destination is the original one without any steering, and its source says which client it is.
"""

import http.client
import json
import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy_static import as_json

from redirector.machine import envoy_binary

PATIENCE_S = 30.0
HTTP = 8080
FRIEND = 101
#: The network as objects have it, which may not be at loopback addresses.
ELSEWHERE = "198.18.0"


class App(BaseHTTPRequestHandler):
    """Answers with what it saw; /slow... never answers in time, /flaky/N/... fails N times,
    /lost/N/... hangs up N times, and /many/N... has N more headers in its answer."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        if self.headers.get("Upgrade") == "websocket":
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.end_headers()
            self.wfile.flush()
            self.wfile.write(self.rfile.readline().upper())
            self.close_connection = True
            return
        server = self.server
        assert isinstance(server, Server)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.asked.append(self.path)
        if self.path.startswith("/slow"):
            server.hold.wait(PATIENCE_S)
        if self.path.startswith(("/flaky/", "/lost/")):
            failures = int(self.path.split("/")[2])
            if server.asked.count(self.path) <= failures:
                if self.path.startswith("/lost/"):
                    self.close_connection = True
                    return
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        seen = {
            "server": self.connection.getsockname()[0],
            "peer": self.client_address[0],
            "path": self.path,
            "headers": {key.lower(): self.headers.get_all(key) for key in self.headers},
        }
        body = json.dumps(seen).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Secret", "shh")
        if self.path.startswith("/many/"):
            for number in range(int(self.path.split("/")[2])):
                self.send_header(f"X-{number}", "")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_LIST = _answer  # noqa: N815 - the base class asks for these names

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class _Anything(grpc.GenericRpcHandler):
    """Answers every call with what it was sent, and tells in its metadata who answers."""

    def __init__(self, address: str, heard: list[str]) -> None:
        self._address = address
        self._heard = heard

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self._heard.append(details.method)

        def say(sent: bytes, context: grpc.ServicerContext) -> bytes:
            hop = dict(details.invocation_metadata).get("x-hop", "")
            context.send_initial_metadata([("x-server", self._address), ("x-hop", hop)])
            return b"heard " + sent

        return grpc.unary_unary_rpc_method_handler(say, bytes, bytes)


@contextmanager
def echo_server(address: str) -> Iterator[list[str]]:
    """A gRPC server that knows every method; tells which it was called by."""
    heard: list[str] = []
    server = grpc.server(ThreadPoolExecutor(2), handlers=[_Anything(address, heard)])
    server.add_insecure_port(address)
    server.start()
    try:
        yield heard
    finally:
        server.stop(None).wait(PATIENCE_S)


class Server(ThreadingHTTPServer):
    """An application, and the paths that it was asked for."""

    def __init__(self, address: str, port: int, hold: threading.Event) -> None:
        super().__init__((address, port), App)
        self.hold = hold
        self.asked: list[str] = []

    def handle_error(self, *_: Any) -> None:
        """Envoy hangs up on a request that took too long."""


@contextmanager
def applications(*addresses: str) -> Iterator[list[Server]]:
    """An HTTP server on each address."""
    hold = threading.Event()
    servers = [Server(address, HTTP, hold) for address in addresses]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield servers
    finally:
        hold.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def random_net() -> str:
    """The beginning of the addresses of a loopback network: `127.4.5`."""
    return f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"


def place(listener: Any, *addresses: tuple[str, int]) -> None:
    """Moves a listener to these addresses."""
    where = [
        listener.address,
        *(listener.additional_addresses.add().address for _ in addresses[1:]),
    ]
    for each, (address, port) in zip(where, addresses, strict=True):
        each.socket_address.address, each.socket_address.port_value = address, port
        each.socket_address.ipv4_compat = False


def outbound_only(config: bootstrap_pb2.Bootstrap, *addresses: tuple[str, int]) -> None:
    """Leaves the listener for the client's own connections, at these addresses."""
    listeners = config.static_resources.listeners
    outbound = next(listener for listener in listeners if listener.name == "outbound")
    del listeners[:]
    listeners.append(outbound)
    place(listeners[0], *addresses)


@contextmanager
def envoy(config: bootstrap_pb2.Bootstrap, folder: Path, probe: tuple[str, int]) -> Iterator[None]:
    """An Envoy that listens on `probe` when this is entered; ELSEWHERE is there, too."""
    net = probe[0].rpartition(".")[0]
    (folder / "bootstrap.json").write_text(as_json(config).replace(f"{ELSEWHERE}.", f"{net}."))
    command = [str(envoy_binary()), "-c", str(folder / "bootstrap.json"), "--concurrency", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-hot-restart", "-l", "warn"], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                socket.create_connection(probe, 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    seen: dict[str, Any]


def asked(
    connection: http.client.HTTPConnection,
    path: str,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    more: Iterable[tuple[str, str]] = (),
) -> Answer:
    """What is answered on a connection."""
    connection.putrequest(method, path, skip_host="Host" in (headers or {}))
    for name, value in [*(headers or {}).items(), *more]:
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    seen = json.loads(body) if response.status == 200 and body else {}
    return Answer(
        response.status, {key.lower(): value for key, value in response.getheaders()}, seen
    )


@dataclass
class Running:
    """The network of the test: `NET.n` is the host numbered n."""

    net: str

    def ask(
        self,
        target: int,
        path: str = "/",
        method: str = "GET",
        client: int = FRIEND,
        headers: Mapping[str, str] | None = None,
        more: Iterable[tuple[str, str]] = (),
        port: int = HTTP,
    ) -> Answer:
        with self.connection(target, client, port) as connection:
            return asked(connection, path, method, headers, more)

    @contextmanager
    def connection(
        self, target: int, client: int = FRIEND, port: int = HTTP
    ) -> Iterator[http.client.HTTPConnection]:
        """One connection, for any number of requests."""
        made = http.client.HTTPConnection(
            f"{self.net}.{target}", port, PATIENCE_S, source_address=(f"{self.net}.{client}", 0)
        )
        try:
            yield made
        finally:
            made.close()

    def raw(self, target: int, port: int, client: int, path: str = "/raw") -> bytes:
        """What comes back for an HTTP request over a plain connection; empty when it is closed."""
        source = (f"{self.net}.{client}", 0)
        with socket.create_connection((f"{self.net}.{target}", port), PATIENCE_S, source) as end:
            try:
                end.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                received = b""
                while block := end.recv(65536):
                    received += block
            except ConnectionError:
                return b""
            return received
