"""A pod as its manifest has it, from its first container to a request that its sidecar sends on."""

import contextlib
import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from agents import UID
from apiserver import ApiServer
from certificates import Authority
from containers import AGENT_IMAGE, Container, Places, container_flags, start
from deployed import XDS_SERVER
from deployments import XDS_NAME, Site, identity, start_xds_server
from running import DEMO
from waiting import PATIENCE_S, eventually
from xds_server.sources.files import load

from redirector.lab import LabPod
from redirector.machine import envoy_binary

pytestmark = pytest.mark.root

MANIFEST = Path(__file__).parents[2] / "manifests" / "sidecar" / "pod.yaml"
#: Envoy's own image is in a registry; this is what ours stand on, with Envoy mounted into it.
BASE = "localhost/debian:12"
SERVICE = "http://10.96.77.1/"
NUMBER = 1

APP = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class App(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"web")
HTTPServer(("0.0.0.0", 8080), App).serve_forever()
"""
ASK = """
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=30) as answer:
    print(answer.headers["x-route"], answer.read().decode())
"""


class Kubelet:
    """Starts the manifest's containers in the pod, one after the other."""

    def __init__(self, site: Site, pod: LabPod, place: Path, volumes: Mapping[str, Path]) -> None:
        self.manifest = yaml.safe_load(MANIFEST.read_text())
        self._site = site
        self._pod = pod
        self._place = place
        metadata = self.manifest["metadata"]
        fields = {f"metadata.{name}": metadata[name] for name in ("name", "namespace")}
        self._places = Places(volumes, {}, {**fields, "status.podIP": pod.ip})

    def container(self, name: str) -> dict[str, Any]:
        (found,) = (
            each for each in self.manifest["spec"]["initContainers"] if each["name"] == name
        )
        return dict(found)

    def start(self, name: str, cgroup: Path) -> Container:
        """Its process is in the pod's cgroup as soon as it is there."""
        given = self.container(name)
        image, words = AGENT_IMAGE, [*given["command"], *given.get("args", [])]
        options = container_flags(self.manifest["spec"], given, self._places)
        if not given["image"].startswith("redirector:"):
            image = BASE
            options.append(f"--volume={envoy_binary()}:{given['command'][0]}:ro")
            # No name server is here: the name is in /etc/hosts, and other questions fail at once.
            options += [f"--add-host={XDS_NAME}:{self._site.home.ip}", "--dns=127.0.0.1"]
        node, log = self._site.ground.node, self._place / f"{name}.log"
        made = start(node, self._pod, image, options, words, log)
        self._site.ground.stack.callback(made.kill)
        running = eventually(
            f"a process of {name}", lambda: made.pid or made.process.poll() is not None
        )
        # One that has ended already needs no cgroup.
        with contextlib.suppress(ProcessLookupError):
            if made.process.poll() is None:
                (cgroup / "cgroup.procs").write_text(str(running))
        return made

    def run(self, name: str, cgroup: Path) -> str:
        """To its end; what it printed."""
        made = self.start(name, cgroup)
        assert made.process.wait(PATIENCE_S) == 0, made.log.read_text()
        return made.log.read_text()


def test_a_pod_begins_steered_and_is_served(
    site: Site, cluster: ApiServer, place: Path, account: Path
) -> None:
    ground, authority = site.ground, Authority()
    cluster.apply(*(each.data for each in load(DEMO)[0]))
    server = start_xds_server(ground.node, site.home, cluster, place, account, authority)
    ground.stack.callback(server.kill)
    for version, address in (("v1", "10.77.0.11"), ("v2", "10.77.0.12")):
        ground.node.pod(version, address).popen([sys.executable, "-c", APP])
    pod = ground.pod("app", NUMBER, listen=False)
    pod.run(["ip", "route", "replace", "default", "via", str(ground.node.subnet[1])], check=True)
    # The sandbox's own process, by which the agent finds the network.
    pod.popen(["sleep", "1000"])
    volumes = {"identity": identity(place / "identity", authority, "default")}
    volumes["envoy"] = place / "envoy"
    volumes["envoy"].mkdir()
    volumes["envoy"].chmod(0o777)
    kubelet = Kubelet(site, pod, place, volumes)
    told = copy.deepcopy(kubelet.manifest)
    told["metadata"]["uid"] = UID % NUMBER
    told["spec"] |= {"nodeName": "node-1", "serviceAccountName": "default"}
    told["status"] = {"phase": "Running", "podIP": pod.ip, "podIPs": [{"ip": pod.ip}]}
    cluster.put("pods", told)

    # It waits while no agent runs.
    awaiting = kubelet.start("await-steering", pod.app)
    site.start()
    assert awaiting.process.wait(PATIENCE_S) == 0, awaiting.log.read_text()
    assert awaiting.log.read_text().startswith("steered after ")
    kubelet.run("bootstrap", pod.app)
    config = json.loads((volumes["envoy"] / "envoy.json").read_text())
    assert config["node"]["cluster"] == "app.default"
    server.until_probed(XDS_SERVER)
    sidecar = kubelet.start("sidecar", pod.sidecar)
    sidecar.until_answering(kubelet.container("sidecar"), "startupProbe", "readinessProbe")
    annotations = kubelet.manifest["metadata"]["annotations"]
    port, path = (annotations[f"prometheus.io/{name}"] for name in ("port", "path"))
    status, metrics = sidecar.ask(int(port), path)
    assert status == 200
    assert "envoy_cluster_upstream_cx_total" in metrics
    # The application's request is its sidecar's, by the mesh's route.
    answer = pod.run([sys.executable, "-S", "-c", ASK, SERVICE])
    assert answer.stdout == "split web\n", answer.stderr + sidecar.log.read_text()
    assert not sidecar.out_of_memory
