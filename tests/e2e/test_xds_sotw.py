"""A real Envoy that speaks the state-of-the-world variant is served as well."""

from collections.abc import Callable
from pathlib import Path

from running import Sidecar, XdsServer
from waiting import eventually

from redirector.lab import Node

WEB = "outbound|80|web.demo"
SPARE = "outbound|80|spare.demo"


def test_envoy_in_the_older_variant_receives_and_follows(
    node: Node, place: Path, serve: Callable[[], XdsServer], manifests: Path
) -> None:
    server = serve()
    pod = node.pod("client", "10.77.0.10")
    xds = f"unix:{server.socket}"
    client = Sidecar(pod, place, "client", "demo", xds, {"api_type": "GRPC"})
    eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])
    assert client.endpoints()["outbound|80|web-v1.demo"] == ["10.77.0.11:8080"]

    route = manifests / "route-web.yaml"
    text = route.read_text().replace("weight: 90", "weight: 50")
    event = server.event_after(lambda: route.write_text(text))
    assert event["changed"] == [f"route {WEB}"]
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (1, [], [])
    assert "50" in str(client.routes()[WEB])

    service = manifests / "spare.yaml"
    text = (manifests / "service-web-v1.yaml").read_text()
    text = text.replace("web-v1", "spare").replace("10.96.77.2", "10.96.77.99")
    event = server.event_after(lambda: service.write_text(text))
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (1, [], [])
    eventually("the new cluster", lambda: SPARE in client.clusters())

    # Clusters have no way to be removed but to be left out; that comes last.
    event = server.event_after(service.unlink)
    assert (event["nacks"], event["waiting"]) == ([], [])
    assert SPARE not in client.clusters()
    assert "NACK" not in server.log


def test_envoy_in_the_older_variant_keeps_a_changed_cluster_warm(
    node: Node, place: Path, serve: Callable[[], XdsServer], manifests: Path
) -> None:
    server = serve()
    pod = node.pod("client", "10.77.0.10")
    xds = f"unix:{server.socket}"
    client = Sidecar(pod, place, "client", "demo", xds, {"api_type": "GRPC"})
    eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])
    service = manifests / "service-web-v1.yaml"
    text = service.read_text().replace("name: http", "name: grpc")
    event = server.event_after(lambda: service.write_text(text))
    assert "cluster outbound|80|web-v1.demo" in event["changed"]
    assert (event["nacks"], event["waiting"]) == ([], [])
    eventually("no cluster that warms", lambda: not client.warming())
