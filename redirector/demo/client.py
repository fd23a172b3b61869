"""The application of the demo's client pod.

`python -m redirector.demo.client ask` reads a JSON list of requests and prints their answers.
`python -m redirector.demo.client keep-sending` sends until it is told to stop, some workers on a
connection that they keep, some on a new one for each request; every outcome is a line in a file.
Nothing is tried twice: what fails, counts.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from http.client import HTTPConnection, HTTPException
from itertools import count
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Request:
    """One request on a connection of its own."""

    host: str
    port: int = 80
    path: str = "/"
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        port = "" if self.port == 80 else f":{self.port}"
        headers = "".join(f"  {name}: {value}" for name, value in self.headers.items())
        return f"{self.method} http://{self.host}{port}{self.path}{headers}"


@dataclass(frozen=True)
class Answer:
    """What came back: `status` is 0 and `error` says why when nothing did.

    `peer` is whom the client believes to be connected to (getpeername(2)); `saw` is what the
    application says it saw, {} when another answered, whose words are in `text`.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    saw: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    peer: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        """The application that answered; empty when none did."""
        return str(self.saw.get("name", ""))


class Kind(StrEnum):
    """Whether a worker keeps its connection."""

    KEPT = "kept"
    FRESH = "fresh"


@dataclass(frozen=True)
class Outcome:
    """One request of `keep-sending`; `at` is CLOCK_MONOTONIC when it was sent, seconds."""

    at: float
    kind: Kind
    worker: int
    status: int
    name: str
    error: str

    @property
    def failed(self) -> bool:
        """Anything but the application's own answer."""
        return self.status != 200 or not self.name


def ask(request: Request) -> Answer:
    """Send one request; whatever becomes of it is an Answer."""
    connection = _connection(request)
    try:
        return _exchange(connection, request, connect=True)
    finally:
        connection.close()


def _connection(request: Request) -> HTTPConnection:
    connection = HTTPConnection(request.host, request.port, timeout=TIMEOUT_S)
    # Or http.client would open a closed connection again and nobody would know.
    connection.auto_open = 0
    return connection


def _exchange(connection: HTTPConnection, request: Request, *, connect: bool) -> Answer:
    try:
        if connect:
            connection.connect()
        host, port = connection.sock.getpeername()[:2]
        connection.request(request.method, request.path, headers=request.headers)
        response = connection.getresponse()
        body = response.read()
    except (OSError, HTTPException) as error:
        return Answer(status=0, error=str(error) or type(error).__name__)
    headers = {name.lower(): value for name, value in response.getheaders()}
    from_app = headers.get("content-type") == "application/json"
    return Answer(
        status=response.status,
        headers=headers,
        saw=json.loads(body) if from_app else {},
        text="" if from_app else body.decode(errors="replace").strip(),
        peer=f"{host}:{port}",
    )


class Sender:
    """Workers that send until `stop` is set; `pause` is seconds between two requests of one."""

    def __init__(self, request: Request, log: Path, pause: float) -> None:
        self.stop = threading.Event()
        self._request = request
        self._pause = pause
        # O_APPEND: the lines of the workers do not mix.
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def work(self, kind: Kind, worker: int) -> None:
        """Send; a kept connection that breaks is a failure, and another one is opened."""
        connection, connect = _connection(self._request), True
        while not self.stop.is_set():
            at = time.monotonic()
            answer = _exchange(connection, self._request, connect=connect)
            outcome = Outcome(at, kind, worker, answer.status, answer.name, answer.error)
            os.write(self._log, f"{json.dumps(asdict(outcome))}\n".encode())
            connect = kind is Kind.FRESH or bool(answer.error)
            if connect:
                connection.close()
            self.stop.wait(self._pause)
        connection.close()


def _ask_all() -> None:
    requests = [Request(**fields) for fields in json.load(sys.stdin)]
    json.dump([asdict(ask(request)) for request in requests], sys.stdout)


def _keep_sending(options: argparse.Namespace) -> None:
    sender = Sender(Request(options.host), options.log, options.pause)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sender.stop.set())
    kinds = [Kind.KEPT] * options.kept + [Kind.FRESH] * options.fresh
    workers = [
        threading.Thread(target=sender.work, args=pair)
        for pair in zip(kinds, count(), strict=False)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main(argv: list[str] | None = None) -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description="Send HTTP requests and say what came back.")
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("ask", help="requests from stdin, answers to stdout, as JSON lists")
    sending = commands.add_parser("keep-sending", help="send until SIGTERM")
    sending.add_argument("--host", required=True)
    sending.add_argument("--kept", type=int, required=True, metavar="WORKERS")
    sending.add_argument("--fresh", type=int, required=True, metavar="WORKERS")
    sending.add_argument("--pause", type=float, required=True, metavar="SECONDS")
    sending.add_argument("--log", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    if options.command == "ask":
        _ask_all()
    else:
        _keep_sending(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
