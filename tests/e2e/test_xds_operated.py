"""What an operator leans on, with a real Envoy: where it stands, and streams that end."""

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

from running import Sidecar, XdsServer
from waiting import eventually
from xds_server.standing import Sync
from xds_server.status import fetch

StartSidecar = Callable[[str, str, str], Sidecar]

TYPES = ("cluster", "endpoints", "listener", "route", "filter")


def admin(server: XdsServer) -> str:
    """Where it tells its operator, by default."""
    return f"unix:{server.socket.with_name('xds-admin.sock')}"


def synced(server: XdsServer) -> bool:
    """Whether the only sidecar has all that it should have."""
    found = fetch(admin(server)).sidecars
    return bool(found) and {each.sync for each in found[0].types} == {Sync.SYNCED}


def test_synced_sidecar_is_told_and_counted(
    place: Path, manifests: Path, sidecar: StartSidecar
) -> None:
    server = XdsServer(place, manifests, "--status-address", "127.0.0.1:0", "--drain-delay", "0s")
    try:
        assert fetch(admin(server)).sidecars == ()
        sidecar("client", "10.77.0.10", f"unix:{server.socket}")
        eventually("all synced", lambda: synced(server))
        command: list[str | Path] = [Path(sys.executable).with_name("xds-server"), "status"]
        command += ["--address", admin(server)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        rows = [line.split()[:3] for line in done.stdout.splitlines()[1:]]
        assert rows == [["demo/client", kind, "SYNCED"] for kind in TYPES]
        # What becomes of the objects of a directory is told here, where else.
        (manifests / "service-web-v2.yaml").unlink()
        lacking = r"HTTPRoute demo/web for Service demo/web port 80 +not ResolvedRefs +BackendNot"

        def told() -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        eventually("the condition", lambda: re.search(lacking, told()))
        done = subprocess.run([*command, "-o", "json"], capture_output=True, text=True, check=True)
        objects = {each["kind"]: each for each in json.loads(done.stdout)["objects"]}
        (parent,) = objects["HTTPRoute"]["parents"]
        assert [each["type"] for each in parent["conditions"]] == [
            "Accepted",
            "ResolvedRefs",
            "Programmed",
        ]
        port = server.wait_for_log(r"metrics and health on port (\d+)")[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
            assert "\nredirector_xds_clients 1.0\n" in page.read().decode()
    finally:
        assert server.stop() == 0


def test_streams_end_at_their_age_and_nothing_is_sent_again(
    place: Path, manifests: Path, sidecar: StartSidecar
) -> None:
    server = XdsServer(place, manifests, "--max-stream-age", "1s")
    try:
        client = sidecar("client", "10.77.0.10", f"unix:{server.socket}")
        eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])
        # Not before it has all: a stream that ends earlier leaves a part for the next one.
        eventually("all synced", lambda: synced(server))
        sent, begun = server.sent(), server.log.count("client.demo connected")
        eventually("more streams", lambda: server.log.count("client.demo connected") >= begun + 3)
        route = manifests / "route-web.yaml"
        text = route.read_text().replace("weight: 90", "weight: 50")
        route.write_text(text)
        eventually("the change", lambda: "50" in str(client.routes()["outbound|80|web.demo"]))
        assert server.sent() == [*sent, "route: 1 (outbound|80|web.demo)"]
        assert client.listeners() == ["inbound", "outbound"]
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log
