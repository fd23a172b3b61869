"""gRPC's own xDS client, without a sidecar: real clients and servers of the same mesh."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import XdsServer
from waiting import eventually

from redirector.bootstrap import node_id
from redirector.lab import Node

PEERS = Path(__file__).with_name("grpc_peers.py")
WEB = "xds:///web.demo:80"
METHOD = "/demo.Greeter/Hello"


class Caller:
    """A gRPC program in the pod `client`."""

    def __init__(self, node: Node, place: Path, server: XdsServer) -> None:
        pod = node.pod("client", "10.77.0.10")
        bootstrap = place / "grpc.json"
        bootstrap.write_text(
            json.dumps(
                {
                    "xds_servers": [
                        {
                            "server_uri": f"unix:{server.socket}",
                            "channel_creds": [{"type": "insecure"}],
                            "server_features": ["xds_v3"],
                        }
                    ],
                    "node": {"id": node_id("client", "demo", pod.ip)},
                }
            )
        )
        self._process = pod.popen(
            [sys.executable, PEERS, "call"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRPC_XDS_BOOTSTRAP": str(bootstrap)},
        )

    def call(self, target: str, count: int = 1, method: str = METHOD) -> dict[str, int]:
        """Who answered how many of so many calls; or by which status they failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(target, method, count, file=self._process.stdin, flush=True)
        found: dict[str, int] = json.loads(self._process.stdout.readline())
        return found


@pytest.fixture
def server(serve: Callable[[], XdsServer]) -> XdsServer:
    return serve()


@pytest.fixture
def caller(node: Node, place: Path, server: XdsServer) -> Iterator[Caller]:
    for name, ip in (("web-v1", "10.77.0.11"), ("web-v2", "10.77.0.12"), ("spare", "10.77.0.13")):
        process = node.pod(name, ip).popen(
            [sys.executable, PEERS, "serve", name, f"{ip}:8080"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    yield Caller(node, place, server)
    assert "NACK" not in server.log


def edit(path: Path, *changes: tuple[str, str]) -> Callable[[], object]:
    """Writes the file with these texts replaced, each of which it holds."""
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return lambda: path.write_text(text)


def test_calls_follow_the_weights_of_a_route_and_its_changes(
    caller: Caller, server: XdsServer, manifests: Path
) -> None:
    calls = 300
    found = caller.call(WEB, calls)
    # 90 to 10, and six standard deviations.
    assert sum(found.values()) == calls == found["web-v1"] + found["web-v2"]
    assert abs(found["web-v2"] - 0.1 * calls) < 6 * (0.09 * calls) ** 0.5

    route = manifests / "route-web.yaml"
    event = server.event_after(edit(route, ("weight: 90", "weight: 0")))
    assert event["changed"] == ["route outbound|80|web.demo"]
    eventually("only the second", lambda: caller.call(WEB, 20) == {"web-v2": 20})


def test_endpoints_that_change_are_followed_under_calls(
    caller: Caller, server: XdsServer, manifests: Path
) -> None:
    # Each name that a client in this namespace may use for the service.
    for name in ("web-v1", "web-v1.demo", "web-v1.demo.svc", "web-v1.demo.svc.cluster.local"):
        assert caller.call(f"xds:///{name}:80") == {"web-v1": 1}

    service = manifests / "service-web-v1.yaml"
    event = server.event_after(edit(service, ("[10.77.0.11]", "[10.77.0.13]")))
    assert event["changed"] == ["endpoints outbound|80|web-v1.demo"]

    def moved() -> bool:
        found = caller.call("xds:///web-v1.demo:80", 20)
        # In between either may answer; no call fails.
        assert found.keys() <= {"web-v1", "spare"}
        return found == {"spare": 20}

    eventually("the other endpoint", moved)


def test_a_service_without_endpoints_fails_and_recovers(
    caller: Caller, server: XdsServer, manifests: Path
) -> None:
    service = manifests / "service-web-v1.yaml"
    server.event_after(
        edit(service, ("addresses: [", "conditions: {ready: false}\n    addresses: ["))
    )
    assert caller.call("xds:///web-v1.demo:80") == {"UNAVAILABLE": 1}
    server.event_after(edit(service, ("ready: false", "ready: true")))
    eventually("calls", lambda: caller.call("xds:///web-v1.demo:80") == {"web-v1": 1})


def test_calls_are_routed_by_their_method(
    caller: Caller, server: XdsServer, manifests: Path
) -> None:
    rule = """rules:
    - matches: [{path: {type: PathPrefix, value: /demo.Greeter}}]
      backendRefs: [{name: web-v2, port: 80}]
    - matches: [{path: {type: Exact, value: /demo.Other/One}}]
      backendRefs: [{name: web-v1, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /demo.Other}, queryParams: [{name: a, value: b}]}]
      backendRefs: [{name: web-v2, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /demo.Blocked}}]
    - matches: [{path: {type: PathPrefix, value: /}, method: GET}]
      backendRefs: [{name: web-v2, port: 80}]
"""
    text = (manifests / "route-web.yaml").read_text()
    route = f"{text.partition('rules:')[0]}{rule}"
    server.event_after(lambda: (manifests / "route-web.yaml").write_text(route))
    answers = {
        METHOD: "web-v2",
        "/demo.Other/One": "web-v1",
        "/demo.GreeterToo/Hello": "UNAVAILABLE",
        "/demo.Other/Two": "UNAVAILABLE",
        "/demo.Blocked/Hello": "UNAVAILABLE",
    }
    for method, answer in answers.items():
        assert caller.call(WEB, 5, method) == {answer: 5}, method


def test_a_grpc_route_goes_by_service_method_and_metadata(
    caller: Caller, server: XdsServer, manifests: Path
) -> None:
    route = """
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: greeter, namespace: demo}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules:
    - matches: [{method: {service: demo.Greeter, method: Hello}}]
      backendRefs: [{name: web-v2, port: 80}]
    - matches: [{method: {service: demo.Greeter}, headers: [{name: x-user, value: tester}]}]
      backendRefs: [{name: web-v1, port: 80}]
    - matches: [{method: {type: RegularExpression, service: "demo[.]O.*", method: One}}]
      backendRefs: [{name: web-v1, port: 80, weight: 1}, {name: web-v2, port: 80, weight: 1}]
"""
    server.event_after(lambda: (manifests / "route-web.yaml").write_text(route))
    assert caller.call(WEB, 10) == {"web-v2": 10}
    found = caller.call(WEB, 100, "/demo.Other/One")
    # Half and half, and six standard deviations.
    assert sum(found.values()) == found["web-v1"] + found["web-v2"]
    assert 20 < found["web-v1"] < 80
    for method in ("/demo.Greeter/Bye", "/demo.Other/Two"):
        assert caller.call(WEB, 5, method) == {"UNAVAILABLE": 5}
