"""The xDS server runs as its manifest describes it, and asks for what its role grants."""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import apiserver
import pytest
import trustme
from apiserver import ApiServer, Object
from certificates import serving
from deployed import XDS_SERVER
from folders import open_folder
from waiting import PATIENCE_S, eventually
from xds_server.sources.files import load

from redirector.apiserver.client import SERVICE_ACCOUNT

pytestmark = pytest.mark.root

DEMO = Path(__file__).parents[2] / "manifests" / "demo"
#: A read-only root, where only $RUN may be written; the manifest's user, who may besides read
#: whatever folder the clone lies in, as it could its own image.
CONTAINER = """
set -e
mount --make-rprivate /
mount --rbind / $ROOT
mount -o remount,bind,ro $ROOT
mount --bind $PLACE $ROOT$PLACE
mount -o remount,bind,ro $ROOT$PLACE
mount --bind $RUN $ROOT$RUN
mount -t tmpfs none $ROOT/run
mkdir -p $ROOT$ACCOUNT
cp $PLACE/token $PLACE/ca.crt $ROOT$ACCOUNT
cap=dac_read_search
exec chroot $ROOT setpriv --reuid $USER --regid $GROUP --clear-groups --no-new-privs \
    --bounding-set=-all,+$cap --inh-caps=-all,+$cap --ambient-caps=+$cap "$@"
"""
#: What the API server calls the resources: that of a role.
RESOURCES = {
    resource: f"{version.rpartition('/')[0].split('/')[0]}/{resource}".lstrip("/")
    for resource, (_, version) in apiserver.KINDS.items()
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that any user may enter."""
    with open_folder("/var/tmp") as path:
        yield path


@pytest.fixture
def cluster(place: Path) -> Iterator[ApiServer]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(place / "ca.crt"))
    (place / "token").write_text("secret")
    with ApiServer(tls=serving(authority)) as made:
        made.apply(*(each.data for each in load(DEMO)[0]), *more())
        yield made


def more() -> list[Object]:
    """An object of each further kind that has a status."""
    web = {"group": "", "kind": "Service", "name": "web"}
    backend = {"name": "web-v1", "port": 80}
    metadata = {"name": "more", "namespace": "demo", "generation": 1}
    return [
        {
            "kind": "GRPCRoute",
            "metadata": metadata,
            "spec": {"parentRefs": [web], "rules": [{"backendRefs": [backend]}]},
        },
        {
            "kind": "TrafficPolicy",
            "metadata": metadata,
            "spec": {"targetRefs": [web], "connectionLimit": {"maxConnections": 10}},
        },
    ]


def certificates(directory: Path) -> None:
    """As a Secret of kubernetes.io/tls is mounted."""
    directory.mkdir()
    authority = trustme.CA()
    made = authority.issue_cert("xds-server.redirector-xds.svc")
    authority.cert_pem.write_to_path(str(directory / "ca.crt"))
    made.cert_chain_pems[0].write_to_path(str(directory / "tls.crt"))
    made.private_key_pem.write_to_path(str(directory / "tls.key"))


def test_it_runs_from_its_manifest_and_needs_what_it_is_granted(
    place: Path, cluster: ApiServer
) -> None:
    container, identity = XDS_SERVER.container(), XDS_SERVER.pod()["securityContext"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    certificates(place / "tls")
    root, run = place / "root", place / "run"
    root.mkdir()
    run.mkdir()
    os.chown(run, identity["runAsUser"], identity["runAsGroup"])
    words = [
        re.sub(r"\[::\]:\d+", "127.0.0.1:0", word)
        .replace(mounts["tls"], str(place / "tls"))
        .replace(mounts["run"], str(run))
        for word in container["args"]
    ]
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(cluster.port),
        "ROOT": str(root),
        "PLACE": str(place),
        "RUN": str(run),
        "ACCOUNT": str(SERVICE_ACCOUNT).replace("/var/run", "/run"),
        "USER": str(identity["runAsUser"]),
        "GROUP": str(identity["runAsGroup"]),
    }
    program = "import sys; from xds_server.cli import main; sys.exit(main())"
    argv = ["unshare", "--mount", "sh", "-c", CONTAINER, "sh", sys.executable, "-P", "-c", program]
    log = place / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*argv, *words], env=environment, stderr=file, cwd="/")

    def said(pattern: str) -> re.Match[str]:
        def probe() -> re.Match[str] | None:
            assert process.poll() is None, log.read_text()
            return re.search(pattern, log.read_text())

        return eventually(f"{pattern} in {log.read_text()}", probe)

    def asked() -> set[tuple[str, str]]:
        return {
            (request.verb, RESOURCES[request.resource] + "/status" * (request.verb == "patch"))
            for request in list(cluster.requests)
        }

    try:
        port = said(r"metrics and health on port (\d+)")[1]
        said("serving\n")
        path = container["readinessProbe"]["httpGet"]["path"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as page:
            assert page.status == 200
        assert (run / "admin.sock").is_socket()
        eventually("all that it may do", lambda: asked() == XDS_SERVER.allowed())
        assert {request.authorization for request in cluster.requests} == {"Bearer secret"}
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
        assert re.search(rf"^Uid:\t{identity['runAsUser']}\t", status, re.M)
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    assert "WARNING a status is not written" not in log.read_text()
