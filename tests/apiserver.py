"""A Kubernetes API server for tests: real HTTP, LIST and WATCH with resource versions, Events,
merge patches of an object's status.

What real servers do wrong now and then is done here on demand: see `Fault`.
"""

import contextlib
import copy
import itertools
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
_GATEWAY, _POLICY = "gateway.networking.k8s.io", "policy.redirector.io/v1alpha1"
#: Resource -> kind and apiVersion.
KINDS = {
    "pods": ("Pod", "v1"),
    "namespaces": ("Namespace", "v1"),
    "nodes": ("Node", "v1"),
    "services": ("Service", "v1"),
    "endpointslices": ("EndpointSlice", "discovery.k8s.io/v1"),
    "httproutes": ("HTTPRoute", f"{_GATEWAY}/v1"),
    "grpcroutes": ("GRPCRoute", f"{_GATEWAY}/v1"),
    "referencegrants": ("ReferenceGrant", f"{_GATEWAY}/v1beta1"),
    "authorizationpolicies": ("AuthorizationPolicy", _POLICY),
    "trafficpolicies": ("TrafficPolicy", _POLICY),
}
_RESOURCES = {kind: resource for resource, (kind, _) in KINDS.items()}
#: A server's own kinds; the others come with a definition.
BUILT_IN = frozenset(("pods", "namespaces", "nodes", "services", "endpointslices"))
METADATA = "as=PartialObjectMetadata"
TIMEOUT = 10.0


class Fault(Enum):
    """What goes wrong with the next requests that match."""

    #: 500 with a Status.
    ERROR = auto()
    #: 200 and HTML.
    GARBAGE = auto()
    #: 200 and a JSON object that is no list, or no event.
    NONSENSE = auto()
    #: A chunked answer that ends in the middle of a line, without its last chunk.
    BROKEN = auto()
    #: The connection is closed without an answer.
    SILENT = auto()
    #: 403.
    FORBIDDEN = auto()


@dataclass(frozen=True)
class Request:
    """A request as it came in."""

    verb: str
    resource: str
    query: dict[str, str]
    accept: str = ""
    authorization: str = ""


@dataclass
class ApiServer:
    """The state of a cluster, and its server; a context manager."""

    objects: dict[str, dict[str, Object]] = field(
        default_factory=lambda: {kind: {} for kind in KINDS}
    )
    #: (version, resource, event type, object), oldest first.
    history: list[tuple[int, str, str, Object]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    events: list[Object] = field(default_factory=list)
    #: (verb, resource) -> what goes wrong, one request each.
    faults: dict[tuple[str, str], list[Fault]] = field(default_factory=dict)
    #: Seconds that every answer takes longer.
    slow: float = 0.0
    #: Speaks TLS by it.
    tls: ssl.SSLContext | None = None
    #: Versions up to this one are forgotten: 410.
    forgotten: int = 0
    #: Resources without a definition: 404.
    undefined: set[str] = field(default_factory=set)
    #: Each status that was written: resource, name, status.
    written: list[tuple[str, str, Object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self._versions = itertools.count(101)
        self.version = 100
        self._open: set[Any] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    # -- the server

    def __enter__(self) -> "ApiServer":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        """Listen, at the same port as before."""
        state = self

        class Handler(_Handler):
            server_state = state

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Listener(("127.0.0.1", self.port), Handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Listen no more and break what is open."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            # Children of the test may hold it, too; closing ours would leave it listening.
            server.socket.shutdown(socket.SHUT_RDWR)
            server.server_close()
        for handler in list(self._open):
            handler.cut()
        with self.changed:
            self.changed.notify_all()

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    @property
    def is_up(self) -> bool:
        return self._server is not None

    # -- the cluster

    def put(self, resource: str, value: Object) -> None:
        """Create or change an object."""
        with self.changed:
            name = _key(value)
            before = self.objects[resource].get(name, {})
            if resource not in BUILT_IN and "status" in before:
                # A status is a resource of its own there.
                value.setdefault("status", copy.deepcopy(before["status"]))
            kind = "MODIFIED" if name in self.objects[resource] else "ADDED"
            self._event(resource, kind, value)
            self.objects[resource][name] = value

    def apply(self, *values: Object) -> None:
        """Create or change objects of kinds that are known; others are ignored."""
        for value in values:
            resource = _RESOURCES.get(value["kind"])
            if resource is None:
                continue
            stored = copy.deepcopy(value)
            stored["apiVersion"] = KINDS[resource][1]
            if resource not in ("namespaces", "nodes"):
                stored["metadata"].setdefault("namespace", "default")
            self.put(resource, stored)

    def delete(self, resource: str, name: str) -> None:
        """Delete an object by namespace/name or name."""
        with self.changed:
            self._event(resource, "DELETED", self.objects[resource].pop(name))

    def patch_status(self, resource: str, name: str, patch: Object) -> tuple[int, Object]:
        """Merge into an object's status (RFC 7386); the HTTP status and the answer."""
        with self.changed:
            value = self.objects[resource].get(name)
            if value is None:
                return 404, {"kind": "Status", "code": 404, "message": f"{name} not found"}
            expected = patch.get("metadata", {}).get("resourceVersion")
            if expected not in (None, value["metadata"]["resourceVersion"]):
                message = "the object has been modified; please apply your changes"
                return 409, {"kind": "Status", "code": 409, "message": message}
            after = copy.deepcopy(value)
            after["status"] = _merged(after.get("status"), patch.get("status", {}))
            self.written.append((resource, name, copy.deepcopy(after["status"])))
            if after != value:
                self._event(resource, "MODIFIED", after)
                self.objects[resource][name] = after
            self.changed.notify_all()
            return 200, after

    def _event(self, resource: str, kind: str, value: Object) -> None:
        self.version = next(self._versions)
        value["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, resource, kind, copy.deepcopy(value)))
        self.changed.notify_all()

    def forget(self) -> None:
        """Make every version known so far too old to watch from, and end the open watches."""
        with self.changed:
            self.version = next(self._versions)
            self.forgotten = self.version
            self.changed.notify_all()

    def fail(self, verb: str, resource: str, *faults: Fault) -> None:
        """Let the next requests go wrong, one by one."""
        with self.changed:
            self.faults.setdefault((verb, resource), []).extend(faults)

    def wait_for(self, happened: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        """Wait until something is true of this server."""
        with self.changed:
            assert self.changed.wait_for(happened, timeout), "it does not happen"

    def seen(self, verb: str, resource: str) -> int:
        """How many such requests came."""
        return sum((r.verb, r.resource) == (verb, resource) for r in list(self.requests))


def _merged(value: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = {**value} if isinstance(value, dict) else {}
    for key, part in patch.items():
        merged[key] = _merged(merged.get(key), part)
        if part is None:
            del merged[key]
    return merged


def path_of(resource: str) -> str:
    """Where a resource is listed."""
    version = KINDS[resource][1]
    return f"/{'apis' if '/' in version else 'api'}/{version}/{resource}"


def _key(value: Object) -> str:
    metadata = value["metadata"]
    namespace = metadata.get("namespace")
    return f"{namespace}/{metadata['name']}" if namespace else metadata["name"]


class _Handler(BaseHTTPRequestHandler):
    server_state: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def cut(self) -> None:
        """Break the connection as a dying server does."""
        with self.server_state.changed, contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        self.server_state._open.add(self)
        try:
            with contextlib.suppress(OSError):
                super().handle()
        finally:
            self.server_state._open.discard(self)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        resource = parts.path.rsplit("/", 1)[-1]
        verb = "watch" if query.get("watch") == "1" else "list"
        fault = self._note(verb, resource, query)
        if fault is not None and self._misbehave(fault, verb):
            return
        unknown = resource not in KINDS or resource in self.server_state.undefined
        if unknown or parts.path != path_of(resource):
            self._status(404, "the server could not find the requested resource")
        elif verb == "list":
            self._list(resource, query)
        else:
            self._watch(resource, query, broken=fault is Fault.BROKEN)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self._note("create", self.path.rsplit("/", 1)[-1], {})
        if fault is not None and self._misbehave(fault, "create"):
            return
        with self.server_state.changed:
            self.server_state.events.append(body)
            self.server_state.changed.notify_all()
        self._answer(201, body)

    def do_PATCH(self) -> None:
        patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        root, _, rest = urlsplit(self.path).path.partition("/namespaces/")
        namespace, resource, name, what = rest.split("/")
        fault = self._note("patch", resource, {})
        if fault is not None and self._misbehave(fault, "patch"):
            return
        if f"{root}/{resource}" != path_of(resource) or what != "status":
            self._status(404, "the server could not find the requested resource")
        elif self.headers["Content-Type"] != "application/merge-patch+json":
            self._status(415, "the body of the request was in an unknown format")
        else:
            self._answer(*self.server_state.patch_status(resource, f"{namespace}/{name}", patch))

    def _note(self, verb: str, resource: str, query: dict[str, str]) -> Fault | None:
        state = self.server_state
        accept, who = self.headers.get("Accept", ""), self.headers.get("Authorization", "")
        with state.changed:
            state.requests.append(Request(verb, resource, query, accept, who))
            waiting = state.faults.get((verb, resource))
            fault = waiting.pop(0) if waiting else None
            state.changed.notify_all()
        time.sleep(state.slow)
        return fault

    def _misbehave(self, fault: Fault, verb: str) -> bool:
        """Whether that was all."""
        if fault is Fault.ERROR:
            self._status(500, "etcdserver: request timed out")
        elif fault is Fault.FORBIDDEN:
            self._status(403, "forbidden: User cannot do this")
        elif fault is Fault.SILENT:
            self.close_connection = True
        elif fault is Fault.GARBAGE:
            self._raw(200, b"<html>It works!</html>\n")
        elif fault is Fault.NONSENSE:
            self._answer(200, {"kind": "Pod"} if verb == "list" else {"type": "ADDED"})
        elif fault is Fault.BROKEN and verb == "list":
            self._raw(200, b'{"kind": "PodList", "items": [', length=10_000)
            self.close_connection = True
        else:
            return False
        return True

    def _list(self, resource: str, query: dict[str, str]) -> None:
        state = self.server_state
        with state.changed:
            version = str(state.version)
            items = [
                copy.deepcopy(value)
                for _, value in sorted(state.objects[resource].items())
                if _selected(value, query)
            ]
        start = 0
        if "continue" in query:
            then, _, offset = query["continue"].partition(":")
            if int(then) < state.forgotten:
                return self._status(410, "the provided continue parameter is too old")
            version, start = then, int(offset)
        end = start + int(query.get("limit", "1000000"))
        metadata = {"resourceVersion": version}
        if end < len(items):
            metadata["continue"] = f"{version}:{end}"
        kind = "PartialObjectMetadata" if self._metadata_only() else KINDS[resource][0]
        cut = [self._cut(value) for value in items[start:end]]
        if resource in BUILT_IN:
            # In lists of these, real servers leave out what the list says already.
            cut = [
                {k: v for k, v in item.items() if k not in ("kind", "apiVersion")} for item in cut
            ]
        return self._answer(200, {"kind": f"{kind}List", "metadata": metadata, "items": cut})

    def _watch(self, resource: str, query: dict[str, str], broken: bool) -> None:
        state = self.server_state
        after = int(query["resourceVersion"])
        if after < state.forgotten:
            return self._status(410, "too old resource version")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        deadline = time.monotonic() + float(query["timeoutSeconds"])
        for line in self._lines(resource, query, after, deadline):
            if broken:
                self._chunk(line[: len(line) // 2])
                self.close_connection = True
                return None
            # In two pieces, because lines and chunks have nothing to do with each other.
            self._chunk(line[:7])
            self._chunk(line[7:])
        if state.is_up:
            self._chunk(b"")
        return None

    def _lines(
        self, resource: str, query: dict[str, str], after: int, deadline: float
    ) -> Iterator[bytes]:
        state = self.server_state
        while state.is_up and time.monotonic() < deadline:
            with state.changed:
                if after < state.forgotten:
                    status = {"kind": "Status", "code": 410, "message": "too old", "metadata": {}}
                    lines = [{"type": "ERROR", "object": status}]
                    after = 1 << 60
                    deadline = 0
                else:
                    lines = [
                        {"type": kind, "object": self._cut(value)}
                        for version, which, kind, value in state.history
                        if which == resource and version > after and _selected(value, query)
                    ]
                    if state.version > after and query.get("allowWatchBookmarks") == "true":
                        mark = {"metadata": {"resourceVersion": str(state.version)}}
                        mark["kind"] = KINDS[resource][0]
                        lines.append({"type": "BOOKMARK", "object": mark})
                    after = state.version
                    if not lines:
                        state.changed.wait(min(0.5, max(0.0, deadline - time.monotonic())))
            for line in lines:
                yield json.dumps(line).encode() + b"\n"

    def _metadata_only(self) -> bool:
        return METADATA in self.headers.get("Accept", "")

    def _cut(self, value: Object) -> Object:
        if not self._metadata_only():
            return value
        return {"kind": "PartialObjectMetadata", "metadata": value["metadata"]}

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _status(self, code: int, message: str) -> None:
        self._answer(code, {"kind": "Status", "code": code, "message": message})

    def _answer(self, code: int, value: Object) -> None:
        self._raw(code, json.dumps(value).encode())

    def _raw(self, code: int, body: bytes, length: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


def _selected(value: Object, query: dict[str, str]) -> bool:
    selector = query.get("fieldSelector")
    if selector is None:
        return True
    name, _, wanted = selector.partition("=")
    if name == "metadata.name":
        return bool(value["metadata"]["name"] == wanted)
    assert name == "spec.nodeName", selector
    return bool(value["spec"].get("nodeName") == wanted)


def kubeconfig(directory: Path, url: str, token: str) -> Path:
    """A kubeconfig file for a server."""
    file = directory / "kubeconfig"
    content = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": token}}],
    }
    file.write_text(json.dumps(content))
    return file


def namespace(name: str, **annotations: str) -> Object:
    """A namespace with annotations of ours (`mode` for redirector.io/mode)."""
    ours = {f"redirector.io/{key}": value for key, value in annotations.items()}
    return {"kind": "Namespace", "metadata": {"name": name, "uid": name, "annotations": ours}}


def pod(
    name: str,
    uid: str,
    node: str = "node-1",
    namespace: str = "default",
    annotations: dict[str, str] | None = None,
    **spec: object,
) -> Object:
    """A pod with annotations of ours."""
    ours = {f"redirector.io/{key}": value for key, value in (annotations or {}).items()}
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "annotations": {"somebody.else/x": "y", **ours},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {"nodeName": node, "containers": [{"name": "app"}], **spec},
        "status": {"phase": "Running"},
    }
