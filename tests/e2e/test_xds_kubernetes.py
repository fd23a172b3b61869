"""A real Envoy follows what a cluster's API server tells the real server."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from apiserver import ApiServer, kubeconfig
from conftest import DEMO
from running import Sidecar, XdsServer
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
    running = XdsServer(place, ["--kubernetes", "--kubeconfig", str(config)])
    yield running
    running.stop()


def endpoints(sidecar: Sidecar) -> list[str]:
    return sidecar.endpoints()["outbound|80|web-v1.demo"]


def test_changes_in_the_cluster_reach_envoy(
    node: Node, place: Path, cluster: ApiServer, served: XdsServer
) -> None:
    client = Sidecar(
        node.pod("client", "10.77.0.10"), place, "client", "demo", f"unix:{served.socket}"
    )
    eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])
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
    assert endpoints(client) == ["10.77.0.11:8080", "10.77.0.99:8080"]
    cluster.forget()
    cluster.up()
    piece["endpoints"].pop()
    event = served.event_after(lambda: cluster.put("endpointslices", piece))
    assert event["changed"] == ["endpoints outbound|80|web-v1.demo"]
    assert endpoints(client) == ["10.77.0.11:8080"]
    assert "NACK" not in served.log
    assert {request.authorization for request in cluster.requests} == {"Bearer secret"}
