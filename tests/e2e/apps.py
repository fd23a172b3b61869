"""Applications in pods: one that answers with what it saw, and one that asks."""

import http.client
import json
import socket
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from waiting import eventually

from redirector.lab import LabPod

PATIENCE_S = 30

#: Answers with its own name and what it saw, on the ports given. A request may ask for more:
#: `x-fail: NAME` for 503 from who is called so, /hold for no answer before /release was asked.
APP = """
import json, socket, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
gates = [threading.Event()]
held = []
class App(BaseHTTPRequestHandler):
    wbufsize = -1
    def do_GET(self):
        if self.path == "/release":
            gates.append(threading.Event())
            gates[-2].set()
        elif self.path == "/hold":
            held.append(self.path)
            gates[-1].wait()
        seen = {"app": sys.argv[1], "peer": self.client_address[0], "path": self.path,
                "held": len(held),
                "headers": {key.lower(): value for key, value in self.headers.items()}}
        self.send_response(503 if self.headers.get("x-fail") == sys.argv[1] else 200)
        self.end_headers()
        self.wfile.write(json.dumps(seen).encode())
    do_POST = do_GET
class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
servers = [Server(("::", int(port)), App) for port in sys.argv[2:]]
for server in servers[1:]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
servers[0].serve_forever()
"""


#: Method, path, headers.
Request = tuple[str, str, dict[str, str]]


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)


def ask(address: str, port: int, requests: list[Request]) -> list[Answer]:
    """Each request on a connection of its own; runs inside a pod."""
    answers = []
    for method, path, headers in requests:
        connection = http.client.HTTPConnection(address, port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read()
            seen = json.loads(body) if response.status == 200 else {}
            named = {key.lower(): value for key, value in response.getheaders()}
            answers.append(Answer(response.status, named, seen))
        except (ConnectionError, http.client.BadStatusLine):
            answers.append(Answer(0))
        finally:
            connection.close()
    return answers


def listens(address: str, port: int) -> bool:
    """Whether somebody does; runs inside a pod."""
    try:
        socket.create_connection((address, port), 1).close()
    except OSError:
        return False
    return True


def start_app(pod: LabPod, place: Path, name: str, port: int, *more: int) -> None:
    """APP in a pod, as `name`, with its log in `place`; it listens on `port` when this returns."""
    argv = [sys.executable, "-c", APP, name, *map(str, (port, *more))]
    with (place / f"{name}-app.log").open("wb") as log:
        pod.popen(argv, stdout=log, stderr=log)
    eventually(f"the application of {name}", partial(pod.call, listens, pod.ip, port))
