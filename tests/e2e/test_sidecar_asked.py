"""The kubelet asks a sidecar whether it is ready, Prometheus for its metrics; nobody for more."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from running import XdsServer
from waiting import eventually

from redirector.bootstrap import bootstrap
from redirector.lab import Node
from redirector.machine import envoy_binary
from redirector.network import within

pytestmark = pytest.mark.root


def get(url: str) -> tuple[int, str]:
    """Status and text; 0 while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except urllib.error.URLError:
        return 0, ""


def test_a_sidecar_is_asked_from_outside(
    node: Node, place: Path, serve: Callable[[], XdsServer]
) -> None:
    pod, kubelet = node.pod("client", "10.77.0.10"), node.pod("kubelet")
    config = place / "bootstrap.json"
    xds = f"unix:{place / 'xds.sock'}"
    made = bootstrap("client", "demo", pod.ip, xds=xds, ready_port=15021, stats_port=15090)
    config.write_text(json.dumps(made))
    words = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
    with (place / "envoy.log").open("wb") as log:
        pod.popen([envoy_binary(), "-c", config, *words], sidecar=True, stdout=log, stderr=log)

    def ask(where: str) -> tuple[int, str]:
        return within(kubelet.netns, lambda: get(f"http://{where}"))

    # Alive, and without a configuration yet.
    admin = "http://127.0.0.1:15000/ready"
    eventually("Envoy", lambda: within(pod.netns, lambda: get(admin))[0] == 503)
    assert ask(f"{pod.ip}:15021/healthz/ready")[0] != 200
    serve()
    eventually("ready", lambda: ask(f"{pod.ip}:15021/healthz/ready") == (200, "LIVE\n"))
    status, text = ask(f"{pod.ip}:15090/stats/prometheus")
    assert status == 200
    assert "envoy_listener_manager_listener_create_success" in text
    for where in ("15021/quitquitquit", "15090/quitquitquit", "15090/config_dump"):
        assert ask(f"{pod.ip}:{where}")[0] == 404
    assert ask(f"{pod.ip}:15000/ready")[0] == 0
