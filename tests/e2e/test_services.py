"""Services of every kind, as an application sees them through a real Envoy."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from apps import Answer, ask, start_app
from running import Sidecar, XdsServer
from waiting import eventually

from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Accelerate, Mode

pytestmark = pytest.mark.root

ZONED, STICKY, FRONT, FAR = "10.96.78.1", "10.96.78.2", "10.96.78.3", "10.96.78.4"
LOCAL = "10.96.78.9"
PODS = {"one": "10.77.0.11", "two": "10.77.0.12"}
NEW = "10.96.78.9"
LATE = f"""
apiVersion: v1
kind: ConfigMap
metadata: {{name: late, namespace: demo}}
---
apiVersion: v1
kind: Service
metadata: {{name: late, namespace: demo}}
spec: {{clusterIP: {NEW}, ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: late, namespace: demo, labels: {{kubernetes.io/service-name: late}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints: [{{addresses: [10.77.0.12]}}]
"""
APP_PORT, DNS_PORT = 8080, 5300

#: Answers every question for an address with the one given (RFC 1035, 4.1).
DNS = """
import socket, sys
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.bind((sys.argv[1], int(sys.argv[2])))
while True:
    asked, peer = end.recvfrom(512)
    stop = asked.index(0, 12) + 5
    wanted = asked[stop - 4 : stop - 2] == bytes([0, 1])
    head = asked[:2] + bytes([0x81, 0x80, 0, 1, 0, int(wanted), 0, 0, 0, 0])
    answer = bytes([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]) + socket.inet_aton(sys.argv[3])
    end.sendto(head + asked[12:stop] + (answer if wanted else b""), peer)
"""
_RESOLVER = {
    "typed_dns_resolver_config": {
        "name": "envoy.network.dns_resolver.cares",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3."
            "CaresDnsResolverConfig",
            "resolvers": [{"socket_address": {"address": PODS["one"], "port_value": DNS_PORT}}],
        },
    }
}


@pytest.fixture
def manifests(place: Path) -> Path:
    folder = place / "manifests"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("services.in.yaml"), folder / "services.yaml")
    return folder


@dataclass
class World:
    client: LabPod
    sidecar: Sidecar
    server: XdsServer
    file: Path

    def ask(self, address: str, port: int = 80, path: str = "/") -> Answer:
        return self.ask_all(address, port, path, 1)[0]

    def ask_all(self, address: str, port: int, path: str, number: int) -> list[Answer]:
        answers: list[Answer] = self.client.call(ask, address, port, [("GET", path, {})] * number)
        return answers

    def apps(self, address: str, port: int = 80) -> set[str]:
        """Who answers 12 connections."""
        return {answer.seen.get("app", "") for answer in self.ask_all(address, port, "/", 12)}

    def ended(self) -> int:
        """How many connections the sidecar has ended in the blackhole."""
        text = self.sidecar.admin("/stats?filter=tcp.blackhole.downstream_cx_total")
        return int(text.rpartition(":")[2])

    def edit(self, old: str, new: str) -> None:
        """Changes the manifests; returns once every sidecar has answered."""
        text = self.file.read_text()
        assert old in text
        self.server.event_after(lambda: self.file.write_text(text.replace(old, new)))


@pytest.fixture
def world(
    node: Node, enrollment: Enrollment, serve: Callable[[], XdsServer], place: Path, manifests: Path
) -> World:
    server = serve()
    pod = node.pod("client", "10.77.0.10")
    for name, ip in PODS.items():
        app = node.pod(name, ip)
        start_app(app, place, name, APP_PORT)
        if name == "one":
            with (place / "dns.log").open("wb") as log:
                where = [ip, str(DNS_PORT), ip]
                app.popen([sys.executable, "-c", DNS, *where], stdout=log, stderr=log)
    sidecar = Sidecar(pod, place, "client", "demo", f"unix:{server.socket}", more=_RESOLVER)
    eventually("listeners", lambda: sidecar.listeners() == ["inbound", "outbound"])
    enrollment.enroll(pod.name, pod.netns, pod.cgroup, Mode.EBPF, Accelerate.ON)
    return World(pod, sidecar, server, manifests / "services.yaml")


def test_kinds_of_services(world: World) -> None:
    # The client's own zone, as long as something there serves.
    assert world.apps(ZONED) == {"one"}
    world.edit("zone: a, conditions: {ready: true}", "zone: a, conditions: {ready: false}")
    assert world.apps(ZONED) == {"two"}
    # The client's own node's, and nothing when there is none.
    assert world.apps(LOCAL) == {"two"}
    world.edit("[10.77.0.12], nodeName: node-1", "[10.77.0.12], nodeName: node-3")
    assert world.ask(LOCAL).status == 503
    # All connections of a client go to one endpoint, over HTTP and TCP.
    assert len(world.apps(STICKY)) == len(world.apps(STICKY, 81)) == 1
    # A headless service has its pods' addresses, and serves routes of others.
    assert world.ask(PODS["two"], APP_PORT).seen["app"] == "two"
    assert world.ask(FRONT).seen["app"] == "two"
    # An ExternalName is resolved by the sidecar.
    assert world.ask(FRONT, path="/outside").seen["app"] == "one"
    # A file that comes takes effect, and so does one that goes; what is not ours in it is said.
    late = world.file.with_name("late.yaml")
    late.write_text(LATE)
    eventually("the new service", lambda: "outbound|80|late.demo" in world.sidecar.clusters())
    assert world.ask(NEW).seen["app"] == "two"
    assert "ignored: ConfigMap demo/late (v1)" in world.server.log
    late.unlink()
    eventually("its end", lambda: "outbound|80|late.demo" not in world.sidecar.clusters())
    # What is no service passes to where it goes ...
    assert world.ask(PODS["one"], APP_PORT).seen["app"] == "one"
    # ... unless the mesh is closed: then services alone are reached, and the rest is counted.
    assert world.ended() == 0
    world.edit("outboundPolicy: allow-any", "outboundPolicy: registry-only")
    assert world.ask(PODS["one"], APP_PORT).status == 0
    assert world.ended() == 1
    for address, port in ((PODS["two"], APP_PORT), (FRONT, 80), (FAR, 80)):
        assert world.ask(address, port).seen["app"] == "two"
    # Told of its own namespace only, it does not know the other's service, but what its own routes
    # lead to.
    world.edit("registry-only}", "registry-only, redirector.io/imports: .}")
    assert world.ask(FAR).status == 0
    assert world.ask(FRONT, path="/far").seen["app"] == "two"
    assert world.ended() == 2
    assert "NACK" not in world.server.log
