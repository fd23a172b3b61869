"""The xDS server's image, run as its Deployment says, and a real Envoy that it configures."""

import copy
import json
import re
from pathlib import Path

import apiserver
import pytest
from apiserver import ApiServer
from certificates import Authority
from deployed import XDS_SERVER
from deployments import XDS_NAME, XDS_PORT, identity, start_xds_server
from running import DEMO, Sidecar
from waiting import eventually
from xds_server.sources.files import load

from redirector.bootstrap import XdsTls
from redirector.lab import Node
from redirector.network import within

pytestmark = pytest.mark.root

#: What the API server calls the resources: that of a role.
RESOURCES = {
    resource: f"{version.rpartition('/')[0].split('/')[0]}/{resource}".lstrip("/")
    for resource, (_, version) in apiserver.KINDS.items()
}


def test_it_serves_a_sidecar_from_its_manifest(
    node: Node, cluster: ApiServer, place: Path, account: Path
) -> None:
    home = node.pod("xds", "10.77.0.50")
    cluster.apply(*(each.data for each in load(DEMO)[0]))
    within(home.netns, cluster.up)
    authority = Authority()
    server = start_xds_server(node, home, cluster, place, account, authority)
    try:
        server.until_probed(XDS_SERVER)
        mine = identity(place / "client", authority, "demo")
        tls = XdsTls(mine / "ca.crt", mine / "tls.crt", mine / "tls.key", XDS_NAME)
        pod = node.pod("client", "10.77.0.10")
        client = Sidecar(pod, place, "client", "demo", f"{home.ip}:{XDS_PORT}", tls=tls)
        eventually("both listeners", lambda: client.listeners() == ["inbound", "outbound"])
        assert client.endpoints()["outbound|80|web-v1.demo"] == ["10.77.0.11:8080"]

        route = json.dumps(copy.deepcopy(cluster.objects["httproutes"]["demo/web"]))
        changed = json.loads(route.replace('"weight": 90', '"weight": 55'))
        cluster.put("httproutes", changed)
        web = "outbound|80|web.demo"
        eventually("the change", lambda: '"weight": 55' in json.dumps(client.routes()[web]))

        # What an operator looks at, as it is told to installers.
        options = (each.partition("=") for each in XDS_SERVER.container()["args"])
        (admin,) = (value for name, _, value in options if name == "--admin")
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
