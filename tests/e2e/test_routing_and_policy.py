"""A real Envoy does to requests what routes and policies say.

One Envoy is given the outbound listener of a client and the inbound listeners of three pods.
"""

import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.cluster.v3 import cluster_pb2
from envoy_static import bootstrap
from one_envoy import (
    ELSEWHERE,
    FRIEND,
    HTTP,
    PATIENCE_S,
    Running,
    applications,
    echo_server,
    envoy,
    outbound_only,
    place,
    random_net,
)
from xds_server.ingest import ingest
from xds_server.ir import Mesh, Name, NodeId
from xds_server.sources.files import parse
from xds_server.translate import translate

TCP = 5432
PODS = {"guarded": 20, "open": 21, "closed": 22}
STRANGER, BY_HOST, TRUSTED, NIGHTLY, HOURLY = 102, 103, 104, 105, 106
WEB, PLAIN, RPC = 10, 11, 13


def _config(mesh: Mesh, net: str) -> bootstrap_pb2.Bootstrap:
    result = bootstrap(translate(mesh, NodeId(f"{ELSEWHERE}.101", "friend", "friends")))
    listeners = result.static_resources.listeners
    outbound_only(result, *((f"{net}.{host}", HTTP) for host in (WEB, PLAIN, RPC)))
    for name, host in PODS.items():
        assert Name("demo", name) in mesh.workloads
        pod = bootstrap(
            translate(mesh, NodeId(f"{ELSEWHERE}.{host}", name, "demo"))
        ).static_resources
        listeners.append(next(one for one in pod.listeners if one.name == "inbound"))
        listeners[-1].name = f"inbound-{host}"
        place(listeners[-1], *((f"{net}.{host}", port) for port in (HTTP, TCP, 15006)))
    # Nothing steers here, so the application is somewhere else than where the client went.
    inbound = next(one for one in result.static_resources.clusters if one.name == "inbound")
    inbound.type = cluster_pb2.Cluster.DiscoveryType.STATIC
    inbound.lb_policy = cluster_pb2.Cluster.LbPolicy.ROUND_ROBIN
    inbound.load_assignment.cluster_name = "inbound"
    app = inbound.load_assignment.endpoints.add().lb_endpoints.add().endpoint.address
    app.socket_address.address, app.socket_address.port_value = f"{net}.1", HTTP
    return result


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    net = random_net()
    text = (Path(__file__).parent / "mesh.in.yaml").read_text().replace("NET", ELSEWHERE)
    objects, unreadable = parse("mesh.in.yaml", text)
    made, wrong = ingest(objects)
    assert unreadable + wrong == []
    with (
        applications(f"{net}.1", f"{net}.2"),
        echo_server(f"{net}.3:{HTTP}"),
        envoy(
            _config(made, net), tmp_path_factory.mktemp("envoy"), (f"{net}.{PODS['closed']}", 15006)
        ),
    ):
        yield Running(net)


@pytest.mark.parametrize(
    ("expected", "client", "method", "path", "headers"),
    [
        (200, FRIEND, "GET", "/fine", {}),
        (403, FRIEND, "POST", "/fine", {}),
        (403, STRANGER, "GET", "/fine", {}),
        # The source is the peer, whatever a header says.
        (403, STRANGER, "GET", "/fine", {"X-Forwarded-For": "NET.101"}),
        # Paths: the beginning, and the ways to spell it.
        (403, FRIEND, "GET", "/admin", {}),
        (403, FRIEND, "GET", "/admin/users?x=1", {}),
        (403, FRIEND, "GET", "/administrator", {}),
        (403, FRIEND, "GET", "//admin", {}),
        (403, FRIEND, "GET", "/./admin", {}),
        (403, FRIEND, "GET", "/fine/../admin", {}),
        (403, FRIEND, "GET", "/fine/%2e%2e/admin", {}),
        (403, FRIEND, "GET", "/fine/..//.//admin", {}),
        (403, FRIEND, "GET", "/%61dmin", {}),
        (403, FRIEND, "GET", "/ad%6Din", {}),
        (403, FRIEND, "GET", "/fine\\..\\admin", {}),
        (403, FRIEND, "GET", "http://somewhere/admin", {}),
        (307, FRIEND, "GET", "/fine%2f..%2Fadmin", {}),
        (307, FRIEND, "GET", "/fine%5c..%5Cadmin", {}),
        (403, FRIEND, "GET", "/exactly", {}),
        (200, FRIEND, "GET", "/exactly/not", {}),
        # What some applications take off a segment.
        (403, FRIEND, "GET", "/exactly;v=1", {}),
        (200, FRIEND, "GET", "/exactly;v=1/not", {}),
        (403, FRIEND, "GET", "/exactly%3bv=1", {}),
        (403, FRIEND, "GET", "/deep%3B/er", {}),
        (403, FRIEND, "GET", "/fine/..%3b/admin", {}),
        (403, FRIEND, "GET", "/deep;a=b;c/er?x", {}),
        (403, FRIEND, "GET", "/deep;/end;/x", {}),
        (200, FRIEND, "GET", "/deep;a=b/erst", {}),
        (200, FRIEND, "GET", "/deep/end", {}),
        (403, FRIEND, "GET", "/fine/..;/admin", {}),
        (403, FRIEND, "GET", "/;/admin", {}),
        (403, FRIEND, "GET", "/deep/;a=b/er", {}),
        (200, FRIEND, "GET", "/fine;/x;", {}),
        (403, FRIEND, "GET", "/a;b%20(x)", {}),
        (403, FRIEND, "GET", "/%61%3bb%20%28x%29/more", {}),
        (200, FRIEND, "GET", "/a%3Bb(x)", {}),
        (403, FRIEND, "GET", "/caf%c3%A9", {}),
        (200, FRIEND, "GET", "/caf%c3%A8", {}),
        (200, FRIEND, "GET", "/fine?next=/admin", {}),
        (200, FRIEND, "GET", "/public/admin", {}),
        # Normal already, however odd.
        (200, FRIEND, "GET", "/.well-known/..a/...?x=//../%61", {}),
        (200, FRIEND, "GET", "/a%20b%3Fc%25/d%40e%c3%a9%7b%60%5e/..%2Xf", {}),
        (200, FRIEND, "GET", "/ordin%61ry/%2d%5F/.", {}),
        # All headers of a rule must match.
        (403, FRIEND, "GET", "/fine", {"x-tier": "guest", "x-agent": "bot/7"}),
        (200, FRIEND, "GET", "/fine", {"x-tier": "guest", "x-agent": "curl"}),
        (200, FRIEND, "GET", "/fine", {"x-agent": "bot/7"}),
        # Hosts, in any case and with any port.
        (200, BY_HOST, "POST", "/admin", {"Host": "a.example.com"}),
        (200, BY_HOST, "GET", "/fine", {"Host": "A.B.Example.COM:99"}),
        (200, BY_HOST, "GET", "/fine", {"Host": "exact.test:8080"}),
        (200, BY_HOST, "GET", "/fine", {"Host": "exact.test."}),
        (200, BY_HOST, "GET", "/fine", {"Host": "exact.test:"}),
        (403, BY_HOST, "GET", "/fine", {"Host": "exactXtest"}),
        (403, BY_HOST, "GET", "/fine", {"Host": "example.com"}),
        (403, BY_HOST, "GET", "/fine", {"Host": "a.example.com.evil.test"}),
        (200, TRUSTED, "PUT", "/anything", {}),
        # What is denied, however an application may read it.
        (403, TRUSTED, "TRACE", "/fine", {}),
        (403, TRUSTED, "trace", "/fine", {}),
        (403, TRUSTED, "GET", "/fine", {"Host": "Secret.test:8080"}),
        (403, TRUSTED, "GET", "/fine", {"Host": "secret.test..:"}),
        (403, TRUSTED, "GET", "/fine", {"Host": "user@secret.test"}),
        (403, TRUSTED, "GET", "/fine", {"Host": "secret.test:port"}),
        (403, TRUSTED, "GET", "/fine", {"Host": "secret.test:80:81"}),
        (403, TRUSTED, "GET", "/fine", {"Host": "other.test,secret.test"}),
        (403, TRUSTED, "GET", "/fine", {"Host": "secret.test,other.test"}),
        (200, TRUSTED, "GET", "/fine", {"Host": "no-secret.test"}),
        # Service accounts, of one namespace.
        (200, NIGHTLY, "GET", "/anything", {}),
        (403, HOURLY, "GET", "/anything", {}),
    ],
)
def test_policy_on_an_http_port(
    mesh: Running, expected: int, client: int, method: str, path: str, headers: dict[str, str]
) -> None:
    given = {key: value.replace("NET", mesh.net) for key, value in headers.items()}
    assert mesh.ask(PODS["guarded"], path, method, client, given).status == expected


def test_a_denied_header_does_not_hide_behind_another(mesh: Running) -> None:
    def status(*headers: tuple[str, str]) -> int:
        return mesh.ask(PODS["guarded"], "/fine", more=headers).status

    agent = ("x-agent", "bot/7")
    assert status(("x-tier", "guest"), ("x-tier", "guest"), agent) == 403
    assert status(("x-tier", "member"), ("x-tier", "guest"), agent) == 403
    assert status(("x-tier", "guest , member"), ("x-agent", "curl"), agent) == 403
    assert status(("x-tier", "guests"), agent) == 200
    assert status(("x-tier", "no guest"), agent) == 200
    assert status(("x-tier", "guest"), ("x-agent", "robot")) == 200


def _over_http2(mesh: Running, target: int, client: int, *more: tuple[bytes, bytes]) -> bytes:
    """The body of the answer to a GET, from an application or from Envoy. Frames by hand: no client
    sends what HTTP/2 forbids (RFC 9113; RFC 7541, 6.2.2)."""

    def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
        head = len(content).to_bytes(3, "big") + bytes([kind, flags])
        return head + stream.to_bytes(4, "big") + content

    fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/fine"), (b"host", b"x")]
    block = b"".join(
        b"\x00" + b"".join(bytes([len(text)]) + text for text in field)
        for field in (*fields, *more)
    )
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
    source = (f"{mesh.net}.{client}", 0)
    with (
        socket.create_connection((f"{mesh.net}.{target}", HTTP), PATIENCE_S, source) as end,
        end.makefile("rb") as received,
    ):
        # HEADERS that end both themselves and the stream.
        end.sendall(hello + frame(1, 5, 1, block))
        while head := received.read(9):
            content = received.read(int.from_bytes(head[:3], "big"))
            if head[3] == 0:
                return content
    raise AssertionError("no answer")


@pytest.mark.parametrize(
    ("tier", "refused"), [(b"guest", True), (b" guest", True), (b"guest\t ", True), (b"x", False)]
)
def test_a_denied_header_does_not_hide_behind_spaces(
    mesh: Running, tier: bytes, refused: bool
) -> None:
    more = (b"x-tier", tier), (b"x-agent", b" bot/7")
    body = _over_http2(mesh, PODS["guarded"], FRIEND, *more)
    assert (body == b"RBAC: access denied") == refused


def test_a_denied_host_does_not_hide_behind_another(mesh: Running) -> None:
    hosts = {"Host": "other.test"}, [("Host", "secret.test")]
    assert mesh.ask(PODS["guarded"], "/fine", "GET", TRUSTED, *hosts).status == 403


def test_an_escaped_slash_is_sent_round_again(mesh: Running) -> None:
    """... to where the policy sees it."""
    answer = mesh.ask(PODS["guarded"], "/fine%2F..%2Fadmin")
    assert answer.headers["location"] == "/admin"


@pytest.mark.parametrize(
    ("pod", "client", "answered"),
    [
        ("guarded", TRUSTED, True),
        ("guarded", STRANGER, False),
        ("guarded", NIGHTLY, True),
        ("guarded", HOURLY, False),
        # Allowed for GET only, which nobody sees on this port.
        ("guarded", FRIEND, False),
        # Allowed on another port only.
        ("guarded", BY_HOST, False),
        ("open", STRANGER, True),
        ("closed", TRUSTED, False),
    ],
)
def test_policy_on_a_tcp_port(mesh: Running, pod: str, client: int, answered: bool) -> None:
    answer = mesh.raw(PODS[pod], TCP, client)
    assert answer.startswith(b"HTTP/1.1 200") if answered else answer == b""
    # It was not taken for HTTP: nothing was added.
    assert b"x-forwarded-for" not in answer.lower()


def test_an_allow_policy_without_rules_allows_nothing(mesh: Running) -> None:
    assert mesh.ask(PODS["closed"], client=TRUSTED).status == 403


def test_a_pod_without_policies_sees_requests_as_they_were_sent(mesh: Running) -> None:
    sent = {"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Proto": "https", "x-envoy-retry-on": "5xx"}
    answer = mesh.ask(PODS["open"], "/a//b/../c%2fd", headers=sent)
    assert answer.seen["path"] == "/a//b/../c%2fd"
    assert answer.seen["peer"] == "127.0.0.6"
    assert answer.seen["headers"]["x-forwarded-for"] == [f"192.0.2.1,{mesh.net}.101"]
    # What took TLS off says so.
    assert answer.seen["headers"]["x-forwarded-proto"] == ["https"]
    assert not [name for name in answer.seen["headers"] if name.startswith("x-envoy")]
    assert answer.headers["server"].startswith("BaseHTTP")


def test_a_connection_without_an_original_destination_is_refused(mesh: Running) -> None:
    assert mesh.raw(PODS["open"], 15006, FRIEND) == b""


@pytest.mark.parametrize(
    ("expected", "method", "path", "headers"),
    [
        (1, "GET", "/shop", {}),
        (1, "GET", "/shop/", {}),
        (1, "GET", "/shop/else?beta=0", {}),
        (404, "GET", "/shopping", {}),
        (404, "GET", "/", {}),
        (2, "GET", "/shop/exact", {}),
        (1, "GET", "/shop/exact/not", {}),
        (2, "GET", "/shop/deeper/still", {}),
        (2, "GET", "/v12/x", {}),
        (404, "GET", "/v12/xy", {}),
        (2, "PUT", "/shop", {}),
        (2, "GET", "/shop", {"X-User": "tester"}),
        (1, "GET", "/shop", {"x-user": "testers"}),
        (2, "GET", "/shop?a=b&beta=1", {}),
        # A host name goes before any path.
        (2, "GET", "/shop", {"Host": "A.example.com:8080"}),
        (2, "GET", "/", {"Host": "a.example.com"}),
        (1, "GET", "/shop", {"Host": "example.com"}),
        (500, "GET", "/drained", {}),
        (500, "GET", "/none", {}),
        (503, "GET", "/empty", {}),
        (504, "GET", "/slow", {}),
        (504, "GET", "/slower", {}),
    ],
)
def test_routes(
    mesh: Running, expected: int, method: str, path: str, headers: dict[str, str]
) -> None:
    """`expected` is the server that answered, or the status."""
    answer = mesh.ask(WEB, path, method, headers=headers)
    if answer.status == 200:
        assert answer.seen["server"] == f"{mesh.net}.{expected}"
    else:
        assert answer.status == expected


def test_weights(mesh: Running) -> None:
    """With 3:1, 200 requests leave this range once in a billion runs."""
    servers = [mesh.ask(WEB, "/split").seen["server"] for _ in range(200)]
    assert 110 <= servers.count(f"{mesh.net}.1") <= 187


def test_header_changes(mesh: Running) -> None:
    sent = {"x-a": "given", "x-gone": "x", "x-both": "app", "x-forwarded-for": "a"}
    answer = mesh.ask(WEB, "/headers", headers=sent)
    headers = answer.seen["headers"]
    assert headers["x-set"] == ["100% %REQ(x-a)%"]
    assert ", ".join(headers["x-a"]) in ("given, added", "given,added")
    assert "x-gone" not in headers
    assert headers["x-both"] == ["backend"]
    assert headers["x-forwarded-for"] == ["a"]
    assert answer.headers["x-answer"] == "changed"
    assert "x-secret" not in answer.headers


def test_a_service_without_a_route_is_just_balanced(mesh: Running) -> None:
    answer = mesh.ask(PLAIN, "/as//it/../is")
    assert (answer.status, answer.seen["path"]) == (200, "/as//it/../is")
    assert not [name for name in answer.seen["headers"] if name.startswith("x-envoy")]


@pytest.mark.parametrize("target", [PLAIN, PODS["open"]])
def test_answers_may_have_many_headers(mesh: Running, target: int) -> None:
    """http.client takes 100 at most."""
    answer = mesh.raw(target, HTTP, FRIEND, "/many/200")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"\r\nx-") > 200


@pytest.mark.parametrize("target", [PLAIN, PODS["open"]])
def test_methods_are_the_applications(mesh: Running, target: int) -> None:
    """Also those that no standard knows."""
    assert mesh.ask(target, "/fine", "LIST").status == 200


@pytest.mark.parametrize("target", [PLAIN, PODS["open"]])
@pytest.mark.parametrize("offered", ["TLS/1.2", "h2c", "websockets", "web", "other/1, more"])
def test_an_offer_to_upgrade_may_be_left_alone(mesh: Running, target: int, offered: str) -> None:
    """RFC 9110, 7.8: some clients offer TLS with every request."""
    answer = mesh.ask(target, headers={"Connection": "Upgrade", "Upgrade": offered})
    assert answer.status == 200
    assert "upgrade" not in answer.seen["headers"]


def test_grpc(mesh: Running) -> None:
    with grpc.insecure_channel(f"{mesh.net}.{RPC}:{HTTP}") as channel:
        call = channel.unary_unary("/demo.Echo/Say", bytes, bytes)
        assert call(b"hello", timeout=PATIENCE_S) == b"heard hello"


@pytest.mark.parametrize("target", [PLAIN, PODS["open"]])
def test_websocket(mesh: Running, target: int) -> None:
    with socket.create_connection((f"{mesh.net}.{target}", HTTP), PATIENCE_S) as end:
        end.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        received = end.makefile("rb")
        assert received.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
        while received.readline().strip():
            pass
        end.sendall(b"shout\n")
        assert received.readline() == b"SHOUT\n"
