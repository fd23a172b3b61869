"""A real Envoy and the real server know each other by certificate, and follow changes of theirs."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from certificates import Authority
from running import Sidecar, XdsServer
from waiting import eventually

from redirector.bootstrap import XdsTls, sds_files
from redirector.lab import Node

ACCOUNT = "spiffe://cluster.local/ns/demo/sa/default"
SERVER_IP = "10.77.0.50"
XDS = f"{SERVER_IP}:18000"


def files(folder: Path, ca: bytes, authority: Authority, name: str) -> XdsTls:
    """PEM files and Envoy's files for them, as somebody puts them there; each appears at once."""
    folder.mkdir(exist_ok=True)
    tls = XdsTls(folder / "ca.crt", folder / "tls.crt", folder / "tls.key", SERVER_IP, folder)
    leaf = authority.issue(name)
    contents = {tls.ca: ca, tls.certificate: leaf.certificate, tls.key: leaf.key}
    contents |= {path: json.dumps(content).encode() for path, content in sds_files(tls).items()}
    for path, content in contents.items():
        new = path.with_suffix(".new")
        new.write_bytes(content)
        new.chmod(0o644)
        os.replace(new, path)
    return tls


@pytest.fixture
def serve_tls(node: Node, place: Path, manifests: Path) -> Iterator[Callable[[XdsTls], XdsServer]]:
    """Starts the server in a pod of its own, on an address that other pods reach."""
    home = node.pod("xds", SERVER_IP)
    running: list[XdsServer] = []

    def start(tls: XdsTls) -> XdsServer:
        options = ("--tls-cert", tls.certificate, "--tls-key", tls.key, "--client-ca", tls.ca)
        server = XdsServer(place, manifests, "--listen", XDS, *options, popen=home.popen)
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


def test_sidecar_is_known_by_its_certificate_and_both_sides_follow_their_files(
    node: Node, place: Path, serve_tls: Callable[[XdsTls], XdsServer], manifests: Path
) -> None:
    first, second = Authority(), Authority()
    both = first.pem + second.pem
    server = serve_tls(files(place / "server", first.pem, first, SERVER_IP))
    tls = files(place / "client", both, first, ACCOUNT)
    client = Sidecar(node.pod("client", "10.77.0.10"), place, "client", "demo", XDS, tls=tls)
    eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])

    # The files change under the open stream, which goes on.
    files(place / "server", second.pem, second, SERVER_IP)
    files(place / "client", second.pem, second, ACCOUNT)
    route = manifests / "route-web.yaml"
    text = route.read_text().replace("weight: 90", "weight: 50")
    event = server.event_after(lambda: route.write_text(text))
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (1, [], [])

    # What connects from now on has the new certificates: the other side knows no others.
    assert server.stop() == 0
    authority, certificate, key = (place / "server" / n for n in ("ca.crt", "tls.crt", "tls.key"))
    again = serve_tls(XdsTls(authority, certificate, key, ""))
    text = text.replace("weight: 50", "weight: 40")
    again.wait_for_log(r"client\.demo connected")
    for kind in ("cluster", "endpoints", "listener", "route"):
        again.wait_for_log(rf"asks {kind}: .*has ")
    event = again.event_after(lambda: route.write_text(text))
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (1, [], [])
    assert again.sent() == ["route: 1 (outbound|80|web.demo)"]


def test_sidecar_of_another_account_or_another_authority_gets_nothing(
    node: Node, place: Path, serve_tls: Callable[[XdsTls], XdsServer]
) -> None:
    authority, stranger = Authority(), Authority()
    server = serve_tls(files(place / "server", authority.pem, authority, SERVER_IP))
    thief = files(place / "thief", authority.pem, authority, "web-v1.demo")
    pod = node.pod("client", "10.77.0.10")
    refused = Sidecar(pod, place, "client", "demo", XDS, tls=thief)
    server.wait_for_log(
        r"refused a client: pod demo/client: the certificate is that of web-v1\.demo;"
        rf" it must name {ACCOUNT} or DNS client\.demo"
    )
    lost = files(place / "lost", stranger.pem, authority, ACCOUNT)
    elsewhere = node.pod("web-v1", "10.77.0.11")
    wary = Sidecar(elsewhere, place, "web-v1", "demo", XDS, tls=lost)
    stat = "cluster.xds.ssl.fail_verify_error"
    eventually(
        "a refused server", lambda: f"{stat}: 0" not in wary.admin(f"/stats?filter=^{stat}$")
    )
    assert (refused.listeners(), wary.listeners()) == ([], [])
    assert " connected," not in server.log
