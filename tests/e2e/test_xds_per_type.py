"""A real Envoy that asks for clusters and listeners on streams of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import Sidecar, XdsServer
from waiting import eventually

from redirector.bootstrap import bootstrap
from redirector.lab import Node

WEB = "outbound|80|web.demo"
SPARE = "outbound|80|spare.demo"


@pytest.mark.parametrize("variant", ["DELTA_GRPC", "GRPC"])
def test_envoy_with_a_stream_for_each_type_receives_and_follows(
    node: Node, place: Path, serve: Callable[[], XdsServer], manifests: Path, variant: str
) -> None:
    server = serve()
    pod = node.pod("client", "10.77.0.10")
    xds = f"unix:{server.socket}"
    made: dict[str, Any] = bootstrap("client", "demo", pod.ip, xds=xds)
    dynamic = made["dynamic_resources"]
    own = {
        "resource_api_version": "V3",
        "api_config_source": {**dynamic["ads_config"], "api_type": variant},
    }
    dynamic |= {"cds_config": own, "lds_config": own}
    client = Sidecar(pod, place, "client", "demo", xds, more={"dynamic_resources": dynamic})
    eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])
    assert client.endpoints()["outbound|80|web-v1.demo"] == ["10.77.0.11:8080"]
    assert WEB in client.routes()

    service = manifests / "spare.yaml"
    text = (manifests / "service-web-v1.yaml").read_text()
    service.write_text(text.replace("web-v1", "spare").replace("10.96.77.2", "10.96.77.99"))
    eventually("the new cluster", lambda: SPARE in client.clusters())
    service.unlink()
    eventually("the cluster gone", lambda: SPARE not in client.clusters())
    assert not client.warming()
    assert "NACK" not in server.log
