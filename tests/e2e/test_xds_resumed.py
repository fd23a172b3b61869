"""A real Envoy whose stream ends, or whose server, and nothing has changed: nothing comes again."""

import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import Sidecar, XdsServer
from waiting import eventually
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE, kind

from redirector.lab import Node

KINDS = sorted(map(kind, (CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE)))
VARIANTS: dict[str, dict[str, Any]] = {"delta": {}, "state of the world": {"api_type": "GRPC"}}
WEB = "outbound|80|web.demo"


def sent_bytes(server: XdsServer) -> dict[str, float]:
    """What the server has sent of each type, as its metrics tell."""
    port = server.wait_for_log(r"metrics and health on port (\d+)")[1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            sample.labels["type"]: sample.value
            for family in families
            for sample in family.samples
            if sample.name == "redirector_xds_response_bytes_sum"
        }


def resources_sent(server: XdsServer) -> list[str]:
    """Each message with resources. Names that are gone and still asked for are told of again: a
    listener that drains keeps its routes."""
    return [each for each in server.sent() if " removed " not in each]


def returned(server: XdsServer, times: int) -> bool:
    """Whether the sidecar has come so often, and asked for the last type on its last stream."""
    streams = server.log.split("client.demo connected")
    return len(streams) > times and "asks route:" in streams[-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_comes_back_with_everything_is_sent_no_byte(
    variant: str,
    node: Node,
    place: Path,
    manifests: Path,
) -> None:
    def start(age: str) -> XdsServer:
        options = (
            "--status-address",
            "127.0.0.1:0",
            "--drain-delay",
            "0s",
            "--max-stream-age",
            age,
        )
        return XdsServer(place, manifests, *options)

    server = start("1h")
    try:
        xds = f"unix:{server.socket}"
        pod = node.pod("client", "10.77.0.10")
        client = Sidecar(pod, place, "client", "demo", xds, VARIANTS[variant])
        eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])
        # A name that it asks for no more is one that it must not be taken to have.
        assert server.event_after((manifests / "service-web-v2.yaml").unlink)["waiting"] == []
        first = sent_bytes(server)
        assert sorted(first) == KINDS
        assert min(first.values()) > 0

        # Another server, on which streams end every second. Envoy comes back at once each time:
        # it is answered, with nothing.
        assert server.stop() == 0
        server = start("1s")
        eventually("several streams", lambda: returned(server, 4))
        assert resources_sent(server) == []
        # An answer's own fields.
        assert sum(sent_bytes(server).values()) < 200 * server.log.count("client.demo connected")

        # It follows all the same.
        route = manifests / "route-web.yaml"
        route.write_text(route.read_text().replace("weight: 90", "weight: 50"))
        eventually("the change", lambda: "50" in str(client.routes()[WEB]))
        assert resources_sent(server) == [f"route: 1 ({WEB})"]
        assert client.listeners() == ["inbound", "outbound"]
        assert not client.warming()
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log
