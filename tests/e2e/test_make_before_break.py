"""Backends are renamed and weighed anew under load: no request is lost."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from apps import start_app
from running import Sidecar, XdsServer
from waiting import eventually

from redirector.enrollment import Enrollment
from redirector.lab import Node
from redirector.model import Accelerate, Mode

pytestmark = pytest.mark.root

DEMO = Path(__file__).parents[2] / "manifests" / "demo"
WEB = "10.96.77.1"
PODS = {"web-v1": "10.77.0.11", "web-v2": "10.77.0.12"}
ROUNDS = 5

#: Asks for as long as its input is open, on connections that are kept and on new ones; then says
#: how often each status came, or each error.
LOAD = """
import collections, http.client, json, sys, threading
counts, done = collections.Counter(), threading.Event()
def work(kept):
    connection = http.client.HTTPConnection(sys.argv[1], 80, timeout=30)
    while not done.is_set():
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
            answer.read()
            counts[str(answer.status)] += 1
        except OSError as error:
            counts[repr(error)] += 1
            connection.close()
        if not kept:
            connection.close()
workers = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(4)]
for worker in workers:
    worker.start()
print("asking", flush=True)
sys.stdin.read()
done.set()
for worker in workers:
    worker.join()
print(json.dumps(counts))
"""


@pytest.fixture
def manifests(place: Path) -> Path:
    """All objects in one file: a change of several is one change."""
    folder = place / "manifests"
    folder.mkdir()
    (folder / "all.yaml").write_text("\n---\n".join(p.read_text() for p in sorted(DEMO.iterdir())))
    return folder


@pytest.mark.parametrize("variant", ["DELTA_GRPC", "GRPC"])
def test_renaming_and_weighing_backends_under_load_loses_no_request(
    node: Node,
    enrollment: Enrollment,
    serve: Callable[[], XdsServer],
    place: Path,
    manifests: Path,
    variant: str,
) -> None:
    server = serve()
    pod = node.pod("client", "10.77.0.10")
    for name, ip in PODS.items():
        start_app(node.pod(name, ip), place, name, 8080)
    xds = f"unix:{server.socket}"
    changed: dict[str, Any] = {"api_type": variant}
    sidecar = Sidecar(pod, place, "client", "demo", xds, changed)
    eventually("listeners", lambda: sidecar.listeners() == ["inbound", "outbound"])
    enrollment.enroll(pod.name, pod.netns, pod.cgroup, Mode.EBPF, Accelerate.ON)

    load = pod.popen(
        [sys.executable, "-c", LOAD, WEB],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert load.stdout is not None
    assert load.stdout.readline() == "asking\n"
    file = manifests / "all.yaml"
    original = file.read_text()
    for number in range(ROUNDS):
        # Another name means another cluster, and the old one goes; the weights change with it.
        text = original.replace("name: web-v1", f"name: web-{number}")
        text = text.replace("service-name: web-v1", f"service-name: web-{number}")
        text = text.replace("weight: 90", f"weight: {10 + 20 * (number % 4)}")
        event = server.event_after(partial(file.write_text, text))
        assert (event["nacks"], event["waiting"]) == ([], [])
        assert f"outbound|80|web-{number}.demo" in sidecar.clusters()
        assert f"outbound|80|web-{number - 1}.demo" not in sidecar.clusters()
    found, _ = load.communicate(timeout=60)
    counts = json.loads(found)
    assert list(counts) == ["200"]
    assert counts["200"] > 100
