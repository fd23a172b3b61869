"""The xDS server's image, run as its Deployment says, and a real Envoy that it configures."""

import copy
import json
import os
import re
from pathlib import Path

import apiserver
import pytest
from apiserver import ApiServer
from certificates import Authority
from containers import XDS_IMAGE, Places, flags, start
from deployed import XDS_SERVER
from running import DEMO, Sidecar
from waiting import eventually
from xds_server.sources.files import load

from redirector.bootstrap import XdsTls
from redirector.lab import Node
from redirector.network import within

pytestmark = pytest.mark.root

#: Its Service's name and port, which certificates and bootstraps name.
SERVICE = XDS_SERVER.one("Service")
NAME = f"{SERVICE['metadata']['name']}.{SERVICE['metadata']['namespace']}.svc"
(PORT,) = (port["port"] for port in SERVICE["spec"]["ports"])
#: What the API server calls the resources: that of a role.
RESOURCES = {
    resource: f"{version.rpartition('/')[0].split('/')[0]}/{resource}".lstrip("/")
    for resource, (_, version) in apiserver.KINDS.items()
}


def secret(directory: Path, authority: Authority) -> Path:
    """`xds-server-tls`, as the kubelet mounts it: root's, and readable for the pod's group."""
    directory.mkdir()
    leaf = authority.issue(NAME)
    leaf.write(directory / "tls.crt", directory / "tls.key")
    (directory / "ca.crt").write_bytes(authority.pem)
    (volume,) = (each for each in XDS_SERVER.pod()["volumes"] if "secret" in each)
    for file in directory.iterdir():
        os.chown(file, 0, XDS_SERVER.pod()["securityContext"]["fsGroup"])
        file.chmod(volume["secret"]["defaultMode"])
    return directory


def identity(directory: Path, authority: Authority) -> XdsTls:
    """The sidecar's."""
    directory.mkdir()
    tls = XdsTls(directory / "ca.crt", directory / "tls.crt", directory / "tls.key", NAME)
    authority.issue("spiffe://cluster.local/ns/demo/sa/default").write(tls.certificate, tls.key)
    tls.ca.write_bytes(authority.pem)
    return tls


def test_it_serves_a_sidecar_from_its_manifest(
    node: Node, cluster: ApiServer, place: Path, account: Path
) -> None:
    home = node.pod("xds", "10.77.0.50")
    cluster.apply(*(each.data for each in load(DEMO)[0]))
    within(home.netns, cluster.up)
    authority = Authority()
    environment = {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(cluster.port),
    }
    places = Places({"tls": secret(place / "tls", authority)}, environment, account)
    container = XDS_SERVER.container()
    words = [*container["command"], *container["args"]]
    server = start(XDS_IMAGE, home, flags(XDS_SERVER, places), words, place / "log")
    try:
        server.until_probed(XDS_SERVER)
        tls = identity(place / "client", authority)
        pod = node.pod("client", "10.77.0.10")
        client = Sidecar(pod, place, "client", "demo", f"{home.ip}:{PORT}", tls=tls)
        eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])
        assert client.endpoints()["outbound|80|web-v1.demo"] == ["10.77.0.11:8080"]

        route = json.dumps(copy.deepcopy(cluster.objects["httproutes"]["demo/web"]))
        changed = json.loads(route.replace('"weight": 90', '"weight": 55'))
        cluster.put("httproutes", changed)
        web = "outbound|80|web.demo"
        eventually("the change", lambda: '"weight": 55' in json.dumps(client.routes()[web]))

        # What an operator looks at, as it is told to installers.
        (admin,) = (w.partition("=")[2] for w in words if w.startswith("--admin="))
        told = server.run("xds-server", "status", "--address", admin)
        assert (told.returncode, told.stderr) == (0, "")
        assert re.search(r"^demo/client +listener +SYNCED ", told.stdout, re.M), told.stdout
        # Nobody in there may write or become more than it is.
        who = XDS_SERVER.pod()["securityContext"]
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert re.search(rf"^Uid:(\t{who['runAsUser']}){{4}}$", status, re.M)
        assert re.search(r"^CapBnd:\t0+$", status, re.M)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
        assert re.search(r"^Seccomp:\t2$", status, re.M)
        assert server.run("touch", "/opt/x").returncode != 0
        asked = {(each.verb, RESOURCES[each.resource]) for each in list(cluster.requests)}
        reading = {each for each in asked if each[0] != "patch"}
        assert reading == {each for each in XDS_SERVER.allowed() if each[0] != "patch"}
        assert not server.out_of_memory
        assert server.stop(XDS_SERVER) == 0, server.log.read_text()
    finally:
        server.kill()
    assert "WARNING" not in server.log.read_text()
