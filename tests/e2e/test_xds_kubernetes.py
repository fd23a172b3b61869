"""A real Envoy follows what a cluster's API server tells the real server."""

import copy
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apiserver import ApiServer, Object, kubeconfig
from running import DEMO, Sidecar, XdsServer
from waiting import eventually
from xds_server.sources.files import load

from redirector.lab import Node

WEB = "outbound|80|web.demo"


@pytest.fixture
def cluster() -> Iterator[ApiServer]:
    with ApiServer() as made:
        objects, problems = load(DEMO)
        assert problems == []
        made.apply(*(each.data for each in objects))
        yield made


@pytest.fixture
def served(place: Path, cluster: ApiServer) -> Iterator[XdsServer]:
    config = kubeconfig(place, cluster.url, "secret")
    source = ["--kubernetes", "--kubeconfig", str(config)]
    running = XdsServer(place, source, "--status-address", "127.0.0.1:0", "--drain-delay", "0s")
    yield running
    running.stop()


def start(node: Node, place: Path, served: XdsServer, more: dict[str, Any]) -> Sidecar:
    pod = node.pod("client", "10.77.0.10")
    started = Sidecar(pod, place, "client", "demo", f"unix:{served.socket}", more=more)
    eventually("both listeners", lambda: started.listeners() == ["inbound", "outbound"])
    return started


@pytest.fixture
def client(node: Node, place: Path, served: XdsServer) -> Sidecar:
    return start(node, place, served, {})


@pytest.fixture
def narrow_client(node: Node, place: Path, served: XdsServer) -> Sidecar:
    """One with Envoy's own bound for regular expressions, which our bootstrap takes away."""
    layer = {"name": "bounds", "static_layer": {"re2.max_program_size.error_level": 100}}
    return start(node, place, served, {"layered_runtime": {"layers": [layer]}})


def metrics(server: XdsServer) -> str:
    port = server.wait_for_log(r"metrics and health on port (\d+)")[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        text: str = page.read().decode()
    return text


def endpoints(sidecar: Sidecar) -> list[str]:
    return sidecar.endpoints()["outbound|80|web-v1.demo"]


def test_changes_in_the_cluster_reach_envoy(
    cluster: ApiServer, served: XdsServer, client: Sidecar
) -> None:
    assert endpoints(client) == ["10.77.0.11:8080"]

    # Endpoints, a route; each alone.
    name, piece = next(
        (name, copy.deepcopy(each))
        for name, each in cluster.objects["endpointslices"].items()
        if each["metadata"]["labels"]["kubernetes.io/service-name"] == "web-v1"
    )
    piece["endpoints"].append({"addresses": ["10.77.0.99"]})
    event = served.event_after(lambda: cluster.put("endpointslices", piece))
    assert event["reason"] == f"changed EndpointSlice {name}"
    assert event["changed"] == ["endpoints outbound|80|web-v1.demo"]
    assert endpoints(client) == ["10.77.0.11:8080", "10.77.0.99:8080"]

    route = copy.deepcopy(cluster.objects["httproutes"]["demo/web"])
    text = json.dumps(route).replace('"weight": 90', '"weight": 55')
    event = served.event_after(lambda: cluster.put("httproutes", json.loads(text)))
    assert (event["reason"], event["nacks"]) == ("changed HTTPRoute demo/web", [])
    assert '"weight": 55' in json.dumps(client.routes()[WEB])

    # An API server that restarts changes nothing; what it tells afterwards arrives.
    cluster.down()
    served.wait_for_log("API server: .*refused")
    assert "\nredirector_xds_source_up 0.0\n" in metrics(served)
    assert endpoints(client) == ["10.77.0.11:8080", "10.77.0.99:8080"]
    cluster.forget()
    cluster.up()
    piece["endpoints"].pop()
    event = served.event_after(lambda: cluster.put("endpointslices", piece))
    assert event["changed"] == ["endpoints outbound|80|web-v1.demo"]
    assert endpoints(client) == ["10.77.0.11:8080"]
    eventually("all is well", lambda: "\nredirector_xds_source_up 1.0\n" in metrics(served))
    assert "NACK" not in served.log
    assert {request.authorization for request in cluster.requests} == {"Bearer secret"}


def test_what_became_of_an_object_stands_in_its_status(
    cluster: ApiServer, served: XdsServer
) -> None:
    """Of two policies for one place the older one holds; then that one goes."""

    def policy(name: str, created: str) -> Object:
        return {
            "kind": "TrafficPolicy",
            "metadata": {
                "name": name,
                "namespace": "demo",
                "generation": 1,
                "creationTimestamp": created,
            },
            "spec": {
                "targetRefs": [{"kind": "Service", "name": "web"}],
                "connectionLimit": {"maxConnections": 10},
            },
        }

    def told(name: str) -> dict[str, tuple[str, int]]:
        status = cluster.objects["trafficpolicies"][f"demo/{name}"].get("status", {})
        return {
            condition["type"]: (condition["status"], condition["observedGeneration"])
            for ancestor in status.get("ancestors", [])
            for condition in ancestor["conditions"]
        }

    cluster.apply(policy("old", "2026-01-01T00:00:00Z"), policy("new", "2026-01-02T00:00:00Z"))
    good = {"Accepted": ("True", 1), "Programmed": ("True", 1)}
    eventually("the older is accepted", lambda: told("old") == good)
    bad = {"Accepted": ("False", 1), "Conflicted": ("True", 1)}
    eventually("the younger is refused", lambda: told("new") == bad)
    served.wait_for_log("WARNING TrafficPolicy demo/new for Service demo/web: Accepted is False")
    cluster.delete("trafficpolicies", "demo/old")
    eventually("the younger holds", lambda: told("new") == good)
    served.wait_for_log("INFO TrafficPolicy demo/new for Service demo/web: Accepted is True")


def test_what_envoy_refuses_is_told_in_its_own_words(
    cluster: ApiServer, narrow_client: Sidecar
) -> None:
    """An expression that is one to us, and too large to this Envoy."""

    def route(expression: str, generation: int) -> Object:
        match = {"headers": [{"name": "x", "type": "RegularExpression", "value": expression}]}
        metadata = {"name": "large", "namespace": "demo", "generation": generation}
        parent = {"group": "", "kind": "Service", "name": "web-v1"}
        rule = {"matches": [match], "backendRefs": [{"name": "web-v2", "port": 80}]}
        spec = {"parentRefs": [parent], "rules": [rule]}
        return {"kind": "HTTPRoute", "metadata": metadata, "spec": spec}

    def told(name: str) -> dict[str, tuple[str, str]]:
        status = cluster.objects["httproutes"][f"demo/{name}"].get("status", {})
        return {
            condition["type"]: (condition["status"], condition["message"])
            for parent in status.get("parents", [])
            for condition in parent["conditions"]
        }

    cluster.apply(route("a{200}", 1))
    eventually("a refusal", lambda: told("large").get("Programmed", ("",))[0] == "False")
    words = told("large")["Programmed"][1]
    assert words.startswith("refused by client.demo: "), words
    assert "max program size" in words, words
    assert told("large")["Accepted"][0] == "True"
    assert told("web")["Programmed"] == ("True", "")
    cluster.apply(route("a{20}", 2))
    eventually("it is taken", lambda: told("large")["Programmed"] == ("True", ""))
    assert "web-v1" in str(narrow_client.routes()["outbound|80|web-v1.demo"])
