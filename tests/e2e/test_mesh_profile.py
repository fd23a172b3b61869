"""What the Gateway API asks of a mesh, case by case, of a real Envoy: what its conformance tests
for meshes look at and no other test here does."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from envoy_static import bootstrap
from one_envoy import (
    ELSEWHERE,
    HTTP,
    PATIENCE_S,
    Running,
    Server,
    applications,
    echo_server,
    envoy,
    outbound_only,
    random_net,
)
from waiting import eventually
from xds_server.ingest import ingest
from xds_server.ir import NodeId
from xds_server.sources.files import parse
from xds_server.translate import translate

NARROW, WIDE, BARE, RPC = 10, 11, 12, 13
ONE, TWO, RPC_ONE, RPC_TWO, FAR = 1, 2, 3, 4, 5


@dataclass
class Mesh:
    """The sidecar of a client in the Services' own namespace; applications by their number."""

    own: Running
    apps: dict[int, Server]
    heard: dict[int, list[str]]


def _client(namespace: str, net: str, folder: Path, stack: ExitStack) -> Running:
    text = (Path(__file__).parent / "profile.in.yaml").read_text().replace("NET", ELSEWHERE)
    objects, unreadable = parse("profile.in.yaml", text)
    mesh, problems = ingest(objects)
    assert unreadable == [problem for problem in problems if problem.own] == []
    config = bootstrap(translate(mesh, NodeId(f"{ELSEWHERE}.101", "client", namespace)))
    services = [(f"{net}.{host}", port) for host in (NARROW, WIDE, BARE) for port in (80, HTTP)]
    outbound_only(config, *services, (f"{net}.{RPC}", HTTP))
    stack.enter_context(envoy(config, folder, (f"{net}.{RPC}", HTTP)))
    return Running(net)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    net = random_net()
    with ExitStack() as stack:
        servers = stack.enter_context(applications(*(f"{net}.{n}" for n in (ONE, TWO, FAR))))
        heard = {
            number: stack.enter_context(echo_server(f"{net}.{number}:{HTTP}"))
            for number in (RPC_ONE, RPC_TWO)
        }
        own = _client("demo", net, tmp_path_factory.mktemp("envoy"), stack)
        yield Mesh(own, dict(zip((ONE, TWO, FAR), servers, strict=True)), heard)


@pytest.mark.parametrize(
    ("target", "port", "host", "route"),
    [
        # A parentRef with a port covers that port only, one without any every port.
        (NARROW, 80, "narrow", "narrow"),
        (NARROW, HTTP, "narrow:8080", None),
        (WIDE, 80, "wide", "method"),
        (WIDE, HTTP, "wide:8080", "method"),
        # The Service is where the connection went, whatever the Host header says.
        (NARROW, 80, "wide", "narrow"),
        (BARE, 80, "narrow", None),
        (BARE, HTTP, "wide:8080", None),
    ],
)
def test_a_route_is_for_its_parents(
    mesh: Mesh, target: int, port: int, host: str, route: str | None
) -> None:
    answer = mesh.own.ask(target, "/method", "POST", headers={"Host": host}, port=port)
    assert (answer.status, answer.headers.get("x-route")) == (200, route)
    assert answer.seen["headers"]["host"] == [host]


def test_a_consumers_route_is_for_its_own_namespace(
    mesh: Mesh, tmp_path_factory: pytest.TempPathFactory
) -> None:
    net = random_net()
    with ExitStack() as stack:
        stack.enter_context(applications(f"{net}.{ONE}"))
        guests = _client("guests", net, tmp_path_factory.mktemp("guests"), stack)
        answer = guests.ask(NARROW, port=80)
        assert (answer.status, answer.headers["x-route"]) == (200, "guests")
        assert guests.ask(WIDE, "/method", "POST", port=80).headers["x-route"] == "method"
    assert mesh.own.ask(NARROW, port=80).headers["x-route"] == "narrow"


@pytest.mark.parametrize(
    ("method", "path", "headers", "route"),
    [
        # A method goes before any number of headers, headers before query parameters.
        ("POST", "/method", {"a": "1", "b": "2"}, "method"),
        ("GET", "/method", {"A": "1"}, "header"),
        ("GET", "/method?q=x&r=y", {"a": "1"}, "header"),
        ("GET", "/method", {"b": "2", "a": "1"}, "headers"),
        ("GET", "/method?q=x", {"a": "2"}, "query"),
        ("GET", "/method?r=12", {}, "query"),
        ("GET", "/method?other&q=x", {}, "query"),
        ("GET", "/method?q=x&r=y", {}, "queries"),
        ("GET", "/method?r=y&q=x", {}, "queries"),
        ("GET", "/method?r=y", {}, None),
        ("GET", "/method?Q=x", {}, None),
        ("GET", "/method?r=12x", {}, None),
        ("GET", "/method", {"a": "11"}, None),
        ("GET", "/methods", {"a": "1"}, None),
    ],
)
def test_what_a_match_says_more_goes_first(
    mesh: Mesh, method: str, path: str, headers: dict[str, str], route: str | None
) -> None:
    answer = mesh.own.ask(WIDE, path, method, headers=headers, port=80)
    assert (answer.status, answer.headers.get("x-route")) == (200 if route else 404, route)


def test_headers_are_changed_whatever_their_case_and_number_with_host_and_path(mesh: Mesh) -> None:
    sent = {"x-set-2": "old", "x-add-2": "old", "x-remove-2": "old", "another": "one"}
    answer = mesh.own.ask(WIDE, "/headers/more?a=b", headers=sent, port=80)
    seen = answer.seen["headers"]
    assert answer.seen["path"] == "/changed/more?a=b"
    assert seen["host"] == ["in.example.com"]
    assert (seen["x-set-1"], seen["x-set-2"]) == (["set-1"], ["set-2"])
    assert (seen["x-add-1"], seen["another"]) == (["add-1"], ["one"])
    assert ",".join(seen["x-add-2"]).replace(" ", "") == "old,add-2"
    assert not {"x-remove-1", "x-remove-2"} & seen.keys()
    assert answer.headers["server"] == "mine"


@pytest.mark.parametrize(
    ("path", "status", "location"),
    [
        ("/path-and-host/a", 302, "http://example.org/new/a"),
        ("/path-and-host", 302, "http://example.org/new"),
        ("/full-and-status/a?b=c", 301, "http://wide/all?b=c"),
        ("/host-and-status/a", 308, "http://example.org/host-and-status/a"),
    ],
)
def test_redirects_change_several_parts(mesh: Mesh, path: str, status: int, location: str) -> None:
    answer = mesh.own.ask(WIDE, path, headers={"Host": "wide"}, port=80)
    assert (answer.status, answer.headers["location"]) == (status, location)


def test_several_mirrors(mesh: Mesh) -> None:
    """The answer is the backend's; what may not be copied to is left out."""
    assert mesh.own.ask(WIDE, "/copies", port=80).seen["server"] == f"{mesh.own.net}.{ONE}"
    for number in (TWO, FAR):
        eventually("a copy", lambda server=mesh.apps[number]: "/copies" in server.asked)
    before = len(mesh.apps[FAR].asked)
    assert mesh.own.ask(WIDE, "/lost-copy", port=80).status == 200
    assert mesh.own.ask(WIDE, "/granted/last", port=80).seen["server"] == f"{mesh.own.net}.{FAR}"
    assert mesh.apps[FAR].asked[before:] == ["/granted/last"]


@pytest.mark.parametrize("path", ["/not-granted", "/not-there", "/no-port", "/no-service"])
def test_what_leads_nowhere_is_answered_with_500(mesh: Mesh, path: str) -> None:
    assert mesh.own.ask(WIDE, path, port=80).status == 500


def test_grpc_mirror_and_headers(mesh: Mesh) -> None:
    with grpc.insecure_channel(f"{mesh.own.net}.{RPC}:{HTTP}") as channel:
        call = channel.unary_unary("/demo.Copied/Say", bytes, bytes)
        _, sent = call.with_call(b"x", timeout=PATIENCE_S)
        assert dict(sent.initial_metadata())["x-server"] == f"{mesh.own.net}.{RPC_ONE}:{HTTP}"
        eventually("the copy", lambda: "/demo.Copied/Say" in mesh.heard[RPC_TWO])
        call = channel.unary_unary("/demo.Hop/Say", bytes, bytes)
        _, sent = call.with_call(b"x", timeout=PATIENCE_S, metadata=(("x-hop", "sent"),))
        # The rule's filters come first, then the backend's.
        assert dict(sent.initial_metadata())["x-hop"] == "backend"
