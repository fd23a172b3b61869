"""A real Envoy does what HTTPRoutes and GRPCRoutes say: redirect, rewrite, mirror, retry, split.

It is given the outbound listener of one sidecar.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import pytest
from envoy_static import bootstrap
from one_envoy import (
    ELSEWHERE,
    HTTP,
    PATIENCE_S,
    Answer,
    Running,
    Server,
    applications,
    asked,
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

WEB, RPC = 10, 13


@dataclass
class Mesh:
    """Requests to `running` are answered by the first or the second application."""

    running: Running
    first: Server
    second: Server

    def who(self, server: str) -> str:
        return {f"{self.running.net}.1": "one", f"{self.running.net}.2": "two"}[server]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    net = random_net()
    text = (Path(__file__).parent / "routes.in.yaml").read_text().replace("NET", ELSEWHERE)
    objects, unreadable = parse("routes.in.yaml", text)
    assert unreadable == []
    made, problems = ingest(objects)
    # Only what this test is about: one filter, backends that are not there, one conflict.
    assert [problem.field for problem in problems if problem.own] == [
        "spec.rules[8].filters[0].type"
    ]
    config = bootstrap(translate(made, NodeId(f"{ELSEWHERE}.101", "client", "demo")))
    outbound_only(config, (f"{net}.{WEB}", HTTP), (f"{net}.{WEB}", 80), (f"{net}.{RPC}", HTTP))
    with (
        applications(f"{net}.1", f"{net}.2") as (first, second),
        echo_server(f"{net}.3:{HTTP}"),
        echo_server(f"{net}.4:{HTTP}"),
        envoy(config, tmp_path_factory.mktemp("envoy"), (f"{net}.{RPC}", HTTP)),
    ):
        yield Mesh(Running(net), first, second)


@pytest.mark.parametrize(
    ("port", "host", "path", "status", "location"),
    [
        # Nothing given: the service's own port, told unless it is the scheme's.
        (80, "web", "/to/nothing?a=b", 302, "http://web/to/nothing?a=b"),
        (80, "web:80", "/to/nothing", 302, "http://web/to/nothing"),
        (8080, "web:8080", "/to/nothing", 302, "http://web:8080/to/nothing"),
        (8080, "web", "/to/nothing", 302, "http://web:8080/to/nothing"),
        # A scheme brings its own port.
        (80, "web", "/to/scheme/x?y=1", 302, "https://web/to/scheme/x?y=1"),
        (8080, "web:8080", "/to/scheme", 302, "https://web/to/scheme"),
        (8080, "[fd00::1]:8080", "/to/scheme", 302, "https://[fd00::1]/to/scheme"),
        (80, "web", "/to/host", 301, "http://other.example.com/to/host"),
        (8080, "web:8080", "/to/host", 301, "http://other.example.com:8080/to/host"),
        (80, "web", "/to/port", 303, "http://web:8443/to/port"),
        (8080, "web:8080", "/to/port", 303, "http://web:8443/to/port"),
        (8080, "web:8080", "/to/port-80", 307, "http://web/to/port-80"),
        (80, "web", "/to/https-8443", 302, "https://a.example.com:8443/to/https-8443"),
        (80, "web", "/to/full/a/b?c=d", 302, "http://web/new?c=d"),
        (8080, "web:8080", "/to/full/a", 302, "http://web:8080/new"),
        (80, "web", "/to/prefix/a?b", 302, "http://web/new/a?b"),
        (80, "web", "/to/prefix", 302, "http://web/new"),
        (80, "web", "/to/prefix/", 302, "http://web/new/"),
        (80, "web", "/to/root", 308, "https://web/"),
        (80, "web", "/to/root/", 308, "https://web/"),
        (8080, "web:8080", "/to/root/a/b?c", 308, "https://web/a/b?c"),
        (80, "web", "/to/root//a", 308, "https://web/a"),
        (80, "web", "/to/prefixes", 404, None),
    ],
)
def test_redirect(
    mesh: Mesh, port: int, host: str, path: str, status: int, location: str | None
) -> None:
    answer = mesh.running.ask(WEB, path, port=port, headers={"Host": host})
    assert (answer.status, answer.headers.get("location")) == (status, location)
    assert answer.headers.get("x-moved") == ("yes" if path.startswith("/to/root") else None)


@pytest.mark.parametrize(
    ("path", "there"),
    [
        # The table of the Gateway API (HTTPPathModifier).
        ("/foo/bar", "/xyz/bar"),
        ("/foo", "/xyz"),
        ("/foo/", "/xyz/"),
        ("/foo/bar?a=/foo", "/xyz/bar?a=/foo"),
        ("/bar/baz", "/xyz/baz"),
        ("/bar", "/xyz"),
        ("/strip.it/bar", "/bar"),
        ("/strip.it", "/"),
        ("/strip.it/", "/"),
        ("/strip.it?a", "/?a"),
        ("/strip.it//bar", "/bar"),
        ("/empty/bar", "/bar"),
        ("/empty", "/"),
        ("/empty/", "/"),
        ("/full/a/b?c=d", "/a$1b?c=d"),
    ],
)
def test_rewritten_path(mesh: Mesh, path: str, there: str) -> None:
    answer = mesh.running.ask(WEB, path)
    assert (answer.status, answer.seen["path"]) == (200, there)
    assert not [name for name in answer.seen["headers"] if name.startswith("x-envoy")]


def test_rewritten_host(mesh: Mesh) -> None:
    assert mesh.running.ask(WEB, "/full").seen["headers"]["host"] == ["in.example.com"]
    assert mesh.running.ask(WEB, "/foo", headers={"Host": "as-it-was:1"}).seen["headers"][
        "host"
    ] == ["as-it-was:1"]


def test_host_is_matched_as_a_header(mesh: Mesh) -> None:
    answer = mesh.running.ask(WEB, "/added/x", headers={"Host": "added.example.com"})
    assert answer.seen["path"] == "/more/added/x"
    assert mesh.running.ask(WEB, "/added/x").status == 404


def test_each_backend_has_filters_of_its_own(mesh: Mesh) -> None:
    """Four equal shares; each of them is missed by 200 requests once in 10^24 runs."""
    seen = set()
    with mesh.running.connection(WEB) as connection:
        for _ in range(200):
            answer = asked(connection, "/each/x")
            where = answer.headers.get("location")
            host = mesh.who(answer.seen["server"]) if answer.seen else where
            seen.add((answer.status, host, answer.seen.get("path")))
    assert seen == {
        (200, "one", "/first/x"),
        (200, "two", "/second/x"),
        (500, None, None),
        (302, "http://third.example.com:8080/each/x", None),
    }


def test_each_backend_has_a_host_of_its_own(mesh: Mesh) -> None:
    answers = [mesh.running.ask(WEB, "/hosts", headers={"Host": "web"}) for _ in range(100)]
    hosts = {(mesh.who(a.seen["server"]), a.seen["headers"]["host"][0]) for a in answers}
    assert hosts == {("one", "first.example.com"), ("two", "web")}


def test_mirrored(mesh: Mesh) -> None:
    answer = mesh.running.ask(WEB, "/mirrored/a?b=c")
    assert mesh.who(answer.seen["server"]) == "one"
    eventually("the copy", lambda: "/mirrored/a?b=c" in mesh.second.asked)
    assert mesh.first.asked.count("/mirrored/a?b=c") == 1


def test_some_are_mirrored(mesh: Mesh) -> None:
    """Of 200, half: outside of this range once in a billion runs."""
    with mesh.running.connection(WEB) as connection:
        for _ in range(200):
            assert asked(connection, "/half-mirrored").status == 200
    mesh.running.ask(WEB, "/mirrored/last")
    eventually("the last copy", lambda: "/mirrored/last" in mesh.second.asked)
    assert 57 <= mesh.second.asked.count("/half-mirrored") <= 143
    assert mesh.first.asked.count("/half-mirrored") == 200


@pytest.mark.parametrize(
    ("path", "headers", "status", "times"),
    [
        ("/flaky/2/a", {}, 200, 3),
        ("/flaky/3/b", {}, 503, 3),
        ("/flaky/1/c", {"retry": "never"}, 503, 1),
        # What hangs up (conformance test HTTPRouteRetryConnectionError).
        ("/lost/2/e", {}, 200, 3),
        ("/lost/3/f", {}, 503, 3),
        # No answer in time is tried again, too.
        ("/slow/d", {}, 504, 2),
    ],
)
def test_tried_again(
    mesh: Mesh, path: str, headers: dict[str, str], status: int, times: int
) -> None:
    assert mesh.running.ask(WEB, path, headers=headers).status == status
    assert mesh.first.asked.count(path) == times


def test_what_refuses_connections_is_passed_over(mesh: Mesh) -> None:
    """Another endpoint is drawn up to six times a try, which ten tries miss once in 10^17."""
    assert {mesh.running.ask(WEB, "/refused").status for _ in range(20)} == {200}


def test_weights_on_one_connection(mesh: Mesh) -> None:
    """With 3:1, 200 requests leave this range once in a billion runs."""
    with mesh.running.connection(WEB) as connection:
        answers = [asked(connection, "/split") for _ in range(200)]
    counts = Counter(mesh.who(answer.seen["server"]) for answer in answers)
    assert 110 <= counts["one"] <= 187
    assert counts["one"] + counts["two"] == 200


def test_a_backend_that_is_not_there_fails_its_share(mesh: Mesh) -> None:
    """Of 200, half: outside of this range once in a billion runs."""
    with mesh.running.connection(WEB) as connection:
        counts = Counter(asked(connection, "/share").status for _ in range(200))
    assert 57 <= counts[200] <= 143
    assert counts[200] + counts[500] == 200


def test_a_broken_rule_fails_its_requests_only(mesh: Mesh) -> None:
    assert mesh.running.ask(WEB, "/broken").status == 500
    assert mesh.running.ask(WEB, "/mirrored").status == 200


def _allowed(answer: Answer) -> dict[str, str]:
    """What is said of requests from other origins."""
    prefix = "access-control-"
    return {
        name.removeprefix(prefix): value
        for name, value in answer.headers.items()
        if name.startswith(prefix)
    }


def _preflight(origin: str, method: str = "PUT") -> dict[str, str]:
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "x-one"}
    return {"Origin": origin, **asked}


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://www.foo.com", True),
        ("https://www.foo.com:443", True),
        ("https://a.bar.com", True),
        ("https://a.b.bar.com", True),
        ("http://port.com:81", True),
        ("http://www.foo.com", False),
        ("https://www.foo.com:444", False),
        ("https://wwwxfoo.com", False),
        ("https://bar.com", False),
        ("https://a.bar.com.evil.com", False),
        ("http://port.com", False),
        ("null", False),
    ],
)
def test_scripts_of_other_origins(mesh: Mesh, origin: str, allowed: bool) -> None:
    simple = mesh.running.ask(WEB, "/cors", headers={"Origin": origin})
    common = {"allow-origin": origin, "allow-credentials": "true"}
    assert simple.status == 200
    assert _allowed(simple) == ({**common, "expose-headers": "x-secret"} if allowed else {})
    before = len(mesh.first.asked)
    answer = mesh.running.ask(WEB, "/cors", method="OPTIONS", headers=_preflight(origin))
    more = {
        "allow-methods": "GET, PUT",
        "allow-headers": "x-one, x-two",
        "expose-headers": "x-secret",
        "max-age": "3600",
    }
    assert answer.status in (200, 204)
    if allowed:
        assert _allowed(answer) == {**common, **more}
    # Nothing else counts without it.
    assert ("allow-origin" in _allowed(answer)) == allowed
    # The application is not asked for it.
    assert len(mesh.first.asked) == before


def test_everything_for_scripts_of_all_origins(mesh: Mesh) -> None:
    ask = partial(mesh.running.ask, WEB, method="OPTIONS", headers=_preflight("http://x.com:12"))
    free = _allowed(ask("/any-cors"))
    assert "allow-credentials" not in free
    assert free["allow-origin"] in ("*", "http://x.com:12")
    assert free["allow-methods"] in ("*", "PUT")
    assert free["allow-headers"] in ("*", "x-one")
    assert free["max-age"] == "5"
    # With credentials "*" is no wildcard to browsers: what they asked for is named.
    named = _allowed(ask("/any-with-credentials"))
    assert (named["allow-origin"], named["allow-credentials"]) == ("http://x.com:12", "true")
    assert (named["allow-methods"], named["allow-headers"]) == ("PUT", "x-one")
    assert "expose-headers" not in named


def test_the_oldest_route_goes_first(mesh: Mesh) -> None:
    assert mesh.who(mesh.running.ask(WEB, "/twice").seen["server"]) == "two"


@pytest.mark.parametrize(
    ("method", "metadata", "expected"),
    [
        ("/demo.Echo/Say", (), (3, "")),
        ("/demo.Echo/Say", (("x-who", "tester"),), (4, "changed")),
        ("/demo.Echo/Sing", (), (4, "changed")),
        ("/other.Thing/Shout", (), (4, "changed")),
        ("/other.Thing/Whisper", (), grpc.StatusCode.UNIMPLEMENTED),
        ("/any.Thing/Anywhere", (), (4, "changed")),
        ("/demo.Echoes/Say", (), grpc.StatusCode.UNIMPLEMENTED),
        ("/demo.Drained/Say", (), grpc.StatusCode.UNAVAILABLE),
        ("/demo.Gone/Say", (), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_grpc_route(
    mesh: Mesh,
    method: str,
    metadata: tuple[tuple[str, str], ...],
    expected: tuple[int, str] | grpc.StatusCode,
) -> None:
    """To services that say nothing of their protocol; `expected` is who answers and what it was
    sent, or the status."""
    with grpc.insecure_channel(f"{mesh.running.net}.{RPC}:{HTTP}") as channel:
        call = channel.unary_unary(method, bytes, bytes)
        if isinstance(expected, grpc.StatusCode):
            with pytest.raises(grpc.RpcError) as failure:
                call(b"hello", timeout=PATIENCE_S, metadata=metadata)
            assert failure.value.code() is expected
            return
        answer, sent = call.with_call(b"hello", timeout=PATIENCE_S, metadata=metadata)
        told = dict(sent.initial_metadata())
        assert answer == b"heard hello"
        assert (told["x-server"], told["x-hop"]) == (
            f"{mesh.running.net}.{expected[0]}:{HTTP}",
            expected[1],
        )


def test_grpc_weights_on_one_connection(mesh: Mesh) -> None:
    """With 1:3, 200 calls leave this range once in a billion runs."""
    counts: Counter[str] = Counter()
    with grpc.insecure_channel(f"{mesh.running.net}.{RPC}:{HTTP}") as channel:
        call = channel.unary_unary("/demo.Split/Say", bytes, bytes)
        for _ in range(200):
            _, sent = call.with_call(b"x", timeout=PATIENCE_S)
            counts[dict(sent.initial_metadata())["x-server"]] += 1
    assert 110 <= counts[f"{mesh.running.net}.4:{HTTP}"] <= 187
    assert counts.total() == 200
