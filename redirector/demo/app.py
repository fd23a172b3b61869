"""The application of the demo's web pods: answers with what it saw, and keeps a list of it.

`python -m redirector.demo.app --port 8080 --name web-v1 --seen FILE`: every request is a JSON line
in FILE before it is answered, so that what is not in FILE never reached the application.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class App(ThreadingHTTPServer):
    """Listens on every address of the pod."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, name: str, seen: Path) -> None:
        self.name = name
        # O_APPEND: the lines of concurrent requests do not mix.
        self.seen = os.open(seen, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        super().__init__(("0.0.0.0", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    #: Buffered: head and body leave in one segment.
    wbufsize = -1
    server: App

    def do_GET(self) -> None:
        line = json.dumps({"method": self.command, "path": self.path})
        os.write(self.server.seen, f"{line}\n".encode())
        length = int(self.headers.get("content-length") or 0)
        self.rfile.read(length)
        saw = {
            "name": self.server.name,
            "method": self.command,
            "path": self.path,
            "client": self.client_address[0],
            "headers": {name.lower(): value for name, value in self.headers.items()},
        }
        body = json.dumps(saw).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `seen` is the log."""


@dataclass(frozen=True)
class Seen:
    """A request that reached an application."""

    method: str
    path: str


def read_seen(path: Path) -> list[Seen]:
    """What an application wrote so far."""
    return [Seen(**json.loads(line)) for line in path.read_text().splitlines()]


def main(argv: list[str] | None = None) -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="Answer HTTP requests with what was seen of them.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seen", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    App(options.port, options.name, options.seen).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
