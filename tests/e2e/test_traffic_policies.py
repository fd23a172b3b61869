"""What TrafficPolicies do to the traffic of applications, through the server and real Envoys."""

import json
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from apps import PATIENCE_S, Answer, Request, ask, start_app
from folders import open_folder
from running import Sidecar, XdsServer
from sockets import pod_socket
from waiting import eventually

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode
from redirector.records import Records

pytestmark = pytest.mark.root

BOTH, ONE = "10.96.77.5", "10.96.77.6"
PODS = {"client": "10.77.0.10", "web-v1": "10.77.0.11", "web-v2": "10.77.0.12"}
OUTSIDE = "10.77.0.13"
HTTP, RAW, NOBODY = 8080, 9090, 9
#: Refuses nobody here. Whatever is counted goes on when it comes, as when pods come and go.
UNHEARD = {"action": "DENY", "rules": [{"from": [{"cidrs": ["192.0.2.0/24"]}]}]}
ROUTE = {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "one"}


@dataclass
class World:
    """Three enrolled pods, and one outside of the mesh."""

    sidecars: dict[str, Sidecar]
    pods: dict[str, LabPod]
    server: XdsServer
    manifests: Path

    @contextmanager
    def policy(self, target: dict[str, str], **parts: Any) -> Iterator[None]:
        """A TrafficPolicy that every sidecar has taken."""
        with self.applied("TrafficPolicy", targetRefs=[target], **parts):
            yield

    @contextmanager
    def applied(self, kind: str, **spec: Any) -> Iterator[None]:
        """The same for any policy."""
        file = self.manifests / f"policy-{secrets.token_hex(3)}.yaml"
        content = {
            "apiVersion": "policy.redirector.io/v1alpha1",
            "kind": kind,
            "metadata": {"name": "it", "namespace": "demo"},
            "spec": spec,
        }
        event = self.server.event_after(lambda: file.write_text(yaml.safe_dump(content)))
        assert (event["nacks"], event["waiting"]) == ([], [])
        self._settle()
        try:
            yield
        finally:
            self.server.event_after(file.unlink)

    def _settle(self) -> None:
        """Envoy's main thread has acknowledged; what comes after a connection, which nobody takes,
        finds its worker up to date."""
        for name in ("web-v1", "web-v2"):
            assert self.statuses(PODS[name], get(), port=NOBODY, pod="outside") == [0]
        assert self.statuses(OUTSIDE, get(), port=NOBODY) == [0]

    def ask(
        self, address: str, *requests: Request, port: int = 80, pod: str = "client"
    ) -> list[Answer]:
        answers: list[Answer] = self.pods[pod].call(
            ask, address, port, list(requests), timeout=PATIENCE_S
        )
        return answers

    def statuses(
        self, address: str, *requests: Request, port: int = 80, pod: str = "client"
    ) -> list[int]:
        return [answer.status for answer in self.ask(address, *requests, port=port, pod=pod)]


def service(name: str, section: str = "") -> dict[str, str]:
    return {"kind": "Service", "name": name} | ({"sectionName": section} if section else {})


def get(path: str = "/", **headers: str) -> Request:
    return ("GET", path, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.fixture(scope="module")
def world(pins: Path) -> Iterator[World]:
    with ExitStack() as stack:
        place = stack.enter_context(open_folder())
        manifests = place / "manifests"
        manifests.mkdir()
        (manifests / "mesh.yaml").write_text(
            (Path(__file__).parent / "traffic.in.yaml").read_text()
        )
        node = stack.enter_context(Node(prefix="rdrtest"))
        server = XdsServer(place, manifests)
        stack.callback(server.stop)
        pods = {name: node.pod(name, ip) for name, ip in PODS.items()}
        pods["outside"] = node.pod("outside", OUTSIDE)
        xds = f"unix:{server.socket}"
        sidecars = {name: Sidecar(pods[name], place, name, "demo", xds) for name in PODS}
        for name in ("web-v1", "web-v2"):
            start_app(pods[name], place, name, HTTP, RAW)
        enrollment = Enrollment(Records(place / "pods"), Datapath(pins))
        for name, sidecar in sidecars.items():
            eventually("listeners", lambda s=sidecar: s.listeners() == ["inbound", "outbound"])
            pod = pods[name]
            enrollment.enroll(pod.name, pod.netns, pod.cgroup, Mode.EBPF, Accelerate.ON)
            stack.callback(enrollment.unenroll, pod.name)
        yield World(sidecars, pods, server, manifests)


def test_a_pod_takes_so_many_requests_of_all_clients_together(world: World) -> None:
    # Nothing is granted anew while the test runs.
    limit = {"requests": 1, "interval": "24h", "burst": 6}
    with world.policy(service("both", "http"), rateLimit=limit):
        # What is refused does not count, and other ports have nothing to do with it.
        post: Request = ("POST", "/", {})
        direct = {"port": HTTP}
        assert world.statuses(PODS["web-v1"], *[post] * 10, **direct) == [403] * 10
        first = world.statuses(PODS["web-v1"], *[get()] * 4, **direct)
        second = world.statuses(PODS["web-v1"], *[get()] * 8, **direct, pod="outside")
        assert Counter(first + second) == {200: 6, 429: 6}
        with world.applied("AuthorizationPolicy", **UNHEARD):
            assert world.statuses(PODS["web-v1"], get(), **direct) == [429]
        assert world.statuses(PODS["web-v2"], get(), **direct) == [200]
    assert world.statuses(PODS["web-v1"], *[get()] * 8, port=HTTP) == [200] * 8


def test_a_port_that_is_not_http_takes_so_many_connections(world: World) -> None:
    limit = {"requests": 1, "interval": "24h", "burst": 3}
    with world.policy(service("both", "raw"), rateLimit=limit):
        answers = world.statuses(PODS["web-v1"], *[get()] * 7, port=RAW, pod="outside")
        assert Counter(answers) == {200: 3, 0: 4}
        with world.applied("AuthorizationPolicy", **UNHEARD):
            assert world.statuses(PODS["web-v1"], get(), port=RAW, pod="outside") == [0]
        assert world.statuses(PODS["web-v1"], get(), port=HTTP, pod="outside") == [200]


def test_a_clients_requests_by_a_rule_are_limited(world: World) -> None:
    limit = {"requests": 1, "interval": "24h", "burst": 2}
    with world.policy(ROUTE | {"sectionName": "teapot"}, rateLimit=limit):
        both = get("/teapot"), get("/kettle")
        assert world.statuses(ONE, *both * 2, get("/teapot")) == [200, 200, 429, 429, 429]
        assert world.statuses(ONE, *[get("/coffee")] * 5) == [200] * 5
    # All rules of a route share its limit.
    with world.policy(ROUTE, rateLimit=limit):
        mixed = get("/coffee"), get("/kettle"), get("/tea")
        assert world.statuses(ONE, *mixed) == [200, 200, 429]


def test_faults(world: World) -> None:
    with world.policy(
        ROUTE | {"sectionName": "teapot"}, faultInjection={"abort": {"httpStatus": 418}}
    ):
        assert world.statuses(ONE, get("/teapot"), get("/coffee")) == [418, 200]
    with world.policy(ROUTE, faultInjection={"abort": {"httpStatus": 500, "percentage": 25}}):
        counts = Counter(world.statuses(ONE, *[get()] * 200))
        # Outside of this range once in a hundred million runs.
        assert set(counts) == {200, 500}
        assert 18 <= counts[500] <= 88
    delay = {"delay": {"fixedDelay": "300ms"}}
    with world.policy(service("both"), faultInjection=delay):
        began = time.monotonic()
        assert world.statuses(BOTH, get()) == [200]
        assert time.monotonic() - began >= 0.3
        # Meant for who asks the service; nothing is done to who is asked.
        stats = world.sidecars["web-v1"].admin("/stats?filter=fault")
        assert "delays_injected: 1" not in stats
    with world.policy(service("both"), faultInjection={"abort": {"grpcStatus": 14}}):
        assert world.pods["client"].call(_grpc_code, BOTH) == "UNAVAILABLE"


def _grpc_code(address: str) -> str:
    with grpc.insecure_channel(f"{address}:80") as channel:
        try:
            channel.unary_unary("/demo.Echo/Say", bytes, bytes)(b"", timeout=PATIENCE_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def test_an_endpoint_that_fails_is_left_out(world: World) -> None:
    outliers = {"consecutive5xxErrors": 2, "baseEjectionTime": "1h", "maxEjectionTime": "1h"}
    failing = get(x_fail="web-v2")
    balancer = {"type": "RoundRobin"}
    with world.policy(service("both"), outlierDetection=outliers, loadBalancer=balancer):
        assert 503 in world.statuses(BOTH, *[failing] * 2)
        eventually("the ejection", lambda: world.statuses(BOTH, *[failing] * 10) == [200] * 10)
        assert {a.seen["app"] for a in world.ask(BOTH, *[get()] * 10)} == {"web-v1"}
        stats = world.sidecars["client"].admin("/stats?filter=outlier_detection.ejections_active")
        assert ": 1" in stats
        # The only endpoint is never given up.
    with world.policy(service("one"), outlierDetection=outliers):
        world.ask(ONE, *[get(x_fail="web-v1")] * 5)
        assert world.statuses(ONE, *[get()] * 3) == [200] * 3


def test_a_circuit_breaker(world: World) -> None:
    held: list[Answer] = []
    with world.policy(service("one"), circuitBreaker={"maxRequests": 1}):
        with pod_socket(world.pods["client"]) as first:
            first.settimeout(PATIENCE_S)
            first.connect((ONE, 80))
            first.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
            # The other way round the breaker: to the pod's own address.
            direct = partial(world.ask, PODS["web-v1"], get(), port=HTTP)
            eventually("the first request", lambda: direct()[0].seen["held"])
            assert world.statuses(ONE, *[get()] * 3) == [503] * 3
            held += world.ask(PODS["web-v1"], get("/release"), port=HTTP)
            assert first.recv(12) == b"HTTP/1.1 200"
        eventually("room", lambda: world.statuses(ONE, get()) == [200])
    overflown = world.sidecars["client"].admin("/stats?filter=one.demo.upstream_rq_active_overflow")
    assert held[0].status == 200
    assert overflown.split() == ["cluster.outbound|80|one.demo.upstream_rq_active_overflow:", "3"]


def test_a_circuit_breaker_for_bytes(world: World) -> None:
    with world.policy(service("both", "raw"), circuitBreaker={"maxConnections": 1}):
        with pod_socket(world.pods["client"]) as first:
            first.settimeout(PATIENCE_S)
            first.connect((BOTH, 90))
            first.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert first.recv(12).endswith(b" 200")
            assert world.statuses(BOTH, *[get()] * 2, port=90) == [0, 0]
            # Another client has its own.
            assert world.statuses(PODS["web-v1"], get(), port=RAW, pod="outside") == [200]
        eventually("room", lambda: world.statuses(BOTH, get(), port=90) == [200])


def test_nobody_waits_in_line(world: World) -> None:
    """One connection to each endpoint, and none that waits for it."""
    breaker = {"maxConnections": 1, "maxPendingRequests": 1}
    direct = partial(world.ask, PODS["web-v1"], get(), port=HTTP)
    with world.policy(service("one"), circuitBreaker=breaker), ExitStack() as stack:
        held = direct()[0].seen["held"]
        ends = [stack.enter_context(pod_socket(world.pods["client"])) for _ in range(2)]
        for end, path in zip(ends, (b"/hold", b"/"), strict=True):
            end.settimeout(PATIENCE_S)
            end.connect((ONE, 80))
            end.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            eventually("the first request", lambda: direct()[0].seen["held"] > held)
        waiting = "/stats?filter=one.demo.upstream_rq_pending_active"
        eventually("a line", lambda: ": 1" in world.sidecars["client"].admin(waiting))
        assert world.statuses(ONE, *[get()] * 3) == [503] * 3
        world.ask(PODS["web-v1"], get("/release"), port=HTTP)
        assert [end.recv(12) for end in ends] == [b"HTTP/1.1 200"] * 2


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        # In turn; of 40 at random, one endpoint has more than 35 once in five million runs.
        ("RoundRobin", 20),
        ("Random", 35),
        ("LeastRequest", 35),
    ],
)
def test_how_endpoints_are_chosen(world: World, kind: str, most: int) -> None:
    with world.policy(service("both"), loadBalancer={"type": kind}):
        counts = Counter(answer.seen["app"] for answer in world.ask(BOTH, *[get()] * 40))
        assert max(counts.values()) <= most
        assert counts.total() == 40


def test_a_pod_accepts_so_many_connections(world: World) -> None:
    with world.policy(service("one"), connectionLimit={"maxConnections": 1}):
        with pod_socket(world.pods["outside"]) as first:
            first.settimeout(PATIENCE_S)
            first.connect((PODS["web-v1"], HTTP))
            first.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert first.recv(12) == b"HTTP/1.1 200"
            assert world.statuses(PODS["web-v1"], get(), port=HTTP, pod="outside") == [0]
        again = partial(world.statuses, PODS["web-v1"], get(), port=HTTP, pod="outside")
        eventually("room", lambda: again() == [200])


@pytest.mark.parametrize("kind", ["RingHash", "Maglev"])
def test_what_hashes_alike_goes_to_one_endpoint(world: World, kind: str) -> None:
    users = [f"user{n}" for n in range(20)]

    def apps(*requests: Request, port: int = 80) -> list[str]:
        return [answer.seen["app"] for answer in world.ask(BOTH, *requests, port=port)]

    by_header = {"type": kind, "hashOn": [{"type": "Header", "header": "X-User"}]}
    with world.policy(service("both"), loadBalancer=by_header):
        once, twice = (apps(*(get(x_user=user) for user in users)) for _ in "12")
        assert once == twice
        assert set(once) == {"web-v1", "web-v2"}
    cookie = {"type": "Cookie", "cookie": {"name": "session", "ttl": "0s", "path": "/"}}
    with world.policy(service("both"), loadBalancer={"type": kind, "hashOn": [cookie]}):
        # Who comes without a cookie is given one that brings him back.
        for given in world.ask(BOTH, *[get()] * 4):
            crumb = given.headers["set-cookie"].split(";")[0]
            assert set(apps(*[get(cookie=crumb)] * 4)) == {given.seen["app"]}
    source = {"type": kind, "hashOn": [{"type": "SourceIP"}]}
    with world.policy(service("both"), loadBalancer=source):
        assert len(set(apps(*[get()] * 20))) == 1
        # Bytes have a source as well.
        assert len(set(apps(*[get()] * 20, port=90))) == 1


def _from_the_link(address: str) -> bytes:
    """What answers who shows no address but that on its link; runs inside a pod."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, index, _, scope, _, device = line.split()
        if scope == "20" and device != "lo":
            with socket.socket(socket.AF_INET6) as end:
                end.settimeout(PATIENCE_S)
                end.bind((str(IPv6Address(bytes.fromhex(digits))), 0, 0, int(index, 16)))
                end.connect((address, HTTP))
                end.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                return end.recv(12)
    raise AssertionError("no link-local address")


def test_who_denies_a_namespace_denies_who_hides_behind_the_link(world: World) -> None:
    outside, pod = world.pods["outside"], world.pods["web-v1"]
    assert outside.call(_from_the_link, pod.ip6) == b"HTTP/1.1 200"
    rules = [{"from": [{"namespaces": ["demo"]}]}]
    with world.applied("AuthorizationPolicy", action="DENY", rules=rules):
        assert outside.call(_from_the_link, pod.ip6) == b"HTTP/1.1 403"
        assert world.statuses(pod.ip6, get(), port=HTTP, pod="outside") == [200]
    rules = [{"from": [{"cidrs": [f"{outside.ip6}/128"]}]}]
    with world.applied("AuthorizationPolicy", action="DENY", rules=rules):
        assert world.statuses(pod.ip6, get(), port=HTTP, pod="outside") == [403]
        assert world.statuses(PODS["web-v1"], get(), port=HTTP, pod="outside") == [200]


def test_a_log_that_cannot_be_written_harms_only_itself(world: World) -> None:
    file = world.manifests / "policy-log.yaml"
    log = {"type": "File", "path": "/nobody/may/write.log"}
    spec = {"targetRefs": [service("both")], "accessLog": [log]}
    policy = {
        "apiVersion": "policy.redirector.io/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": {"name": "it", "namespace": "demo"},
        "spec": spec,
    }
    event = world.server.event_after(lambda: file.write_text(yaml.safe_dump(policy)))
    assert any("unable to open file '/nobody/may/write.log'" in nack for nack in event["nacks"])
    raw = partial(world.statuses, PODS["web-v1"], get(), port=RAW)
    assert (world.statuses(ONE, get()), raw()) == ([200], [200])
    # The same pod's requests are judged by today's rules.
    deny = {"rules": [{"to": [{"paths": ["/secret"]}]}], "action": "DENY"}
    text = yaml.safe_dump({**policy, "kind": "AuthorizationPolicy", "spec": deny})
    more = world.manifests / "policy-secret.yaml"
    world.server.event_after(lambda: more.write_text(text))
    eventually("the policy", lambda: world.statuses(ONE, get("/secret")) == [403])
    assert world.statuses(ONE, get("/./secret"), get("/fine")) == [403, 200]
    # So are connections to its port that is not HTTP, with the log in one chain of the listener.
    eventually("the policy", lambda: raw() == [0])
    for path in (more, file):
        world.server.event_after(path.unlink)
    eventually("no policy", lambda: raw() == [200])


def test_a_connection_stays_open_while_pods_come_and_go_for_the_policies_of_its_port(
    world: World,
) -> None:
    allow = {"rules": [{"from": [{"namespaces": ["demo"]}]}]}
    with world.applied("AuthorizationPolicy", **allow):
        assert world.statuses(PODS["web-v2"], get(), port=RAW, pod="outside") == [0]
        inbound = world.sidecars["web-v2"].dump("ListenersConfigDump", "dynamic_listeners")
        more = world.manifests / "pod-outside.yaml"
        spec = {"containers": [{"name": "it"}]}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "outside", "namespace": "demo"},
        }
        text = yaml.safe_dump({**pod, "spec": spec, "status": {"podIP": OUTSIDE}})
        world.server.event_after(lambda: more.write_text(text))
        # Its address is allowed now, by the very same listener.
        eventually(
            "leave",
            lambda: world.statuses(PODS["web-v2"], get(), port=RAW, pod="outside") == [200],
        )
        after = world.sidecars["web-v2"].dump("ListenersConfigDump", "dynamic_listeners")
        assert after == inbound
        world.server.event_after(more.unlink)


def test_access_logs(world: World) -> None:
    file = world.sidecars["web-v2"].folder / "access.log"
    logs = [
        {"format": "JSON", "filter": {"minStatus": 400, "maxStatus": 499}},
        {"type": "File", "path": str(file), "text": "%PROTOCOL% %REQ(:PATH)% %RESPONSE_CODE% 1%%"},
    ]
    one = {"kind": "Service", "name": "second"}
    with world.policy(one, accessLog=logs):
        direct = partial(world.statuses, PODS["web-v2"], port=HTTP)
        assert direct(get("/fine"), ("POST", "/refused", {})) == [200, 403]
        assert world.statuses(PODS["web-v2"], get("/bytes"), port=RAW) == [200]
    # Envoy writes what it holds back when it ends.
    sidecar = world.sidecars["web-v2"]
    sidecar.process.terminate()
    sidecar.process.wait(PATIENCE_S)
    assert sorted(file.read_text().splitlines()) == [
        "- - 0 1%",
        "HTTP/1.1 /fine 200 1%",
        "HTTP/1.1 /refused 403 1%",
    ]
    lines = sidecar.log().splitlines()
    (told,) = [json.loads(line) for line in lines if line.startswith("{")]
    assert (told["path"], told["status"], told["method"]) == ("/refused", 403, "POST")
    assert told["peer"].startswith(f"{PODS['client']}:")
