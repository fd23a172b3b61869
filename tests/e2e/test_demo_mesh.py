"""The demo's manifests, served by the xDS server, steered in each mode: what applications see."""

import http.client
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from apps import PATIENCE_S, Answer, Request, ask, start_app
from running import Sidecar, XdsServer
from sockets import pod_socket
from waiting import eventually

from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode

pytestmark = pytest.mark.root

WEB, WEB_V1 = "10.96.77.1", "10.96.77.2"
PODS = {"client": "10.77.0.10", "web-v1": "10.77.0.11", "web-v2": "10.77.0.12"}
PLAIN_IP = "10.77.0.13"
APP_PORT = 8080

#: Ends the object that is being told of, after another one.
MORE = """metadata: {name: more, namespace: demo}
spec: {clusterIP: 10.96.77.9, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
"""


@dataclass
class Demo:
    client: LabPod
    plain: LabPod
    web_v1: LabPod
    server: XdsServer

    def ask(
        self,
        address: str,
        port: int = 80,
        path: str = "/",
        method: str = "GET",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        return self.ask_all(address, port, [(method, path, headers or {})])[0]

    def ask_all(
        self, address: str, port: int, requests: list[Request], pod: LabPod | None = None
    ) -> list[Answer]:
        answers: list[Answer] = (pod or self.client).call(ask, address, port, requests)
        return answers


def _configured(sidecar: Sidecar) -> bool:
    return sidecar.listeners() == ["inbound", "outbound"]


@pytest.fixture(params=list(Mode))
def demo(
    request: pytest.FixtureRequest,
    node: Node,
    enrollment: Enrollment,
    serve: Callable[[], XdsServer],
    sidecar: Callable[[str, str, str], Sidecar],
    place: Any,
) -> Demo:
    server = serve()
    sidecars = [sidecar(name, ip, f"unix:{server.socket}") for name, ip in PODS.items()]
    pods = {one.name: one._pod for one in sidecars}
    pods["plain"] = node.pod("plain", PLAIN_IP)
    for name, pod in pods.items():
        start_app(pod, place, name, APP_PORT)
    for one in sidecars:
        eventually("listeners", partial(_configured, one))
        pod = one._pod
        enrollment.enroll(pod.name, pod.netns, pod.cgroup, request.param, Accelerate.ON)
    return Demo(pods["client"], pods["plain"], pods["web-v1"], server)


def test_what_applications_see(demo: Demo) -> None:
    # The header match, by the service's own address; the client's address on the other side.
    answer = demo.ask(WEB, headers={"x-user": "tester"})
    assert (answer.status, answer.seen["app"]) == (200, "web-v2")
    assert answer.seen["headers"]["x-forwarded-for"] == PODS["client"]
    assert answer.seen["peer"] == "::ffff:127.0.0.6"
    # The split and the header changes.
    answers = demo.ask_all(WEB, 80, [("GET", "/", {})] * 100)
    split = Counter(answer.seen["app"] for answer in answers)
    assert 70 <= split["web-v1"] < 100
    assert {answer.seen["headers"]["x-routed-by"] for answer in answers} == {"redirector"}
    assert {answer.headers["x-route"] for answer in answers} == {"split"}
    # The Host header does not choose the service.
    assert demo.ask(WEB_V1, headers={"Host": "web-v2.demo"}).seen["app"] == "web-v1"
    # The policy holds by every way in: through the service, and to the pod itself.
    for address, port in ((WEB, 80), (PODS["web-v1"], APP_PORT)):
        assert demo.ask(address, port, "/admin").status == 403
        assert demo.ask(address, port, "/%61dmin").status == 403
        assert demo.ask(address, port, method="POST").status == 403
        assert demo.ask(address, port, "/fine").status == 200
    # From a pod without a sidecar, too; and to it, everything passes.
    requests: list[Request] = [("GET", "/fine", {}), ("GET", "/admin", {})]
    direct = demo.ask_all(PODS["web-v1"], APP_PORT, requests, demo.plain)
    assert [answer.status for answer in direct] == [200, 403]
    assert direct[0].seen["headers"]["x-forwarded-for"] == PLAIN_IP
    passed = demo.ask(PLAIN_IP, APP_PORT, "/admin", method="POST")
    assert (passed.status, passed.seen["peer"]) == (200, f"::ffff:{PODS['client']}")
    # Nobody listens there: refused, or closed by the sidecar that cannot reach it either.
    assert demo.ask(PLAIN_IP, 9).status == 0
    # Straight to a listener there is no original destination: refused, and no loop.
    for port in (15001, 15006):
        assert demo.ask(PODS["web-v1"], port).status == 0
    # A pod may be its own backend: through its sidecar out and in, once.
    own = demo.ask_all(WEB, 80, [("GET", "/fine", {})] * 20, demo.web_v1)
    assert {answer.status for answer in own} == {200}
    by_itself = [answer for answer in own if answer.seen["app"] == "web-v1"]
    assert by_itself
    assert {answer.seen["headers"]["x-forwarded-for"] for answer in by_itself} == {PODS["web-v1"]}
    assert {answer.seen["peer"] for answer in by_itself} == {"::ffff:127.0.0.6"}
    # Over IPv6, to a port that nothing declares.
    (six,) = demo.ask_all(demo.client.ip6, APP_PORT, requests[:1], demo.plain)
    assert (six.status, six.seen["app"], six.seen["peer"]) == (200, "client", "::6")


@pytest.mark.parametrize("demo", [Mode.EBPF], indirect=True)
def test_changes_hold_at_once_and_close_no_connection(demo: Demo, manifests: Path) -> None:
    """One connection of the application, through all of them."""
    connection = http.client.HTTPConnection(WEB, 80)
    connection.sock = pod_socket(demo.client)
    connection.sock.settimeout(PATIENCE_S)
    connection.sock.connect((WEB, 80))
    socket_of_the_first = connection.sock

    def status(path: str) -> int:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert connection.sock is socket_of_the_first, "the connection was closed"
        return response.status

    def changed(name: str, old: str, new: str) -> None:
        text = (manifests / name).read_text()
        assert old in text
        event = demo.server.event_after(
            lambda: (manifests / name).write_text(text.replace(old, new))
        )
        assert event["nacks"] == []

    assert status("/fine") == 200
    # A policy, who is meant by one, a service more, where a route goes.
    changed("policy-web.yaml", "/admin*", "/fine*")
    # Envoy's main thread has acknowledged; its worker may be a moment behind.
    eventually("the new policy", lambda: status("/fine") == 403)
    assert status("/admin") == 200
    changed("pod-plain.yaml", PLAIN_IP, "10.77.0.77")
    changed("service-web-v1.yaml", "kind: Service\n", f"kind: Service\n{MORE}")
    assert (status("/fine"), status("/admin")) == (403, 200)
    changed("route-web.yaml", "weight: 90", "weight: 0")
    assert (status("/fine"), status("/admin")) == (403, 200)


@pytest.mark.parametrize("demo", [Mode.EBPF], indirect=True)
def test_the_first_policy_for_paths_holds_on_connections_older_than_it(
    demo: Demo, manifests: Path
) -> None:
    """They stay with a listener that does not normalize."""
    policy = manifests / "policy-web.yaml"
    text = policy.read_text()
    demo.server.event_after(policy.unlink)
    # One without a sidecar chooses itself how it spells a path.
    with pod_socket(demo.plain) as connection, connection.makefile("rb") as received:
        connection.settimeout(PATIENCE_S)
        connection.connect((PODS["web-v1"], APP_PORT))

        def status(path: str) -> int:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            code = int(received.readline().split()[1])
            names = http.client.parse_headers(received)
            if "content-length" in names:
                received.read(int(names["content-length"]))
            else:
                while size := int(received.readline(), 16):
                    received.read(size + 2)
                received.readline()
            return code

        spellings = ("/./admin", "/%61dmin", "/x/..%2fadmin", "/x/../admin", "/x\\..\\admin")
        assert [status(path) for path in spellings] == [200] * len(spellings)
        demo.server.event_after(lambda: policy.write_text(text))
        eventually("the policy", lambda: status("/admin") == 403)
        assert [status(path) for path in spellings] == [403] * len(spellings)
        assert status("/fine") == 200
