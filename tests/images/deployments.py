"""The agent and the xDS server in containers of their images, as a cluster would run them."""

import os
from pathlib import Path

import apiserver
from agents import Ground, Running
from apiserver import ApiServer
from certificates import Authority
from containers import (
    AGENT_IMAGE,
    XDS_IMAGE,
    Container,
    Places,
    flags,
    run_to_end,
    start,
)
from deployed import AGENT, XDS_SERVER

from redirector.lab import LabPod, Node
from redirector.machine import cgroup2_mount, ensure_bpffs
from redirector.network import within
from redirector.records import Records

#: The pod that the agent runs in.
HOME = "10.77.0.50"
#: The xDS server's Service, which certificates and bootstraps name.
_SERVICE = XDS_SERVER.one("Service")
XDS_NAME = f"{_SERVICE['metadata']['name']}.{_SERVICE['metadata']['namespace']}.svc"
(XDS_PORT,) = (port["port"] for port in _SERVICE["spec"]["ports"])


def in_cluster(cluster: ApiServer) -> dict[str, str]:
    """What each container of a cluster has in its environment."""
    return {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(cluster.port),
    }


class Site:
    """A node for the agent's pod, and the agent in it."""

    def __init__(self, node: Node, cluster: ApiServer, place: Path, account: Path) -> None:
        self.home = node.pod("agent", HOME)
        if not cluster.is_up:
            within(self.home.netns, cluster.up)
        cluster.put("namespaces", apiserver.namespace("default"))
        state = place / "state"
        state.mkdir()
        pins = ensure_bpffs() / f"{node.name}-image"
        self.ground = Ground(node, cluster, Records(state / "pods"), pins, place / "log")
        environment = {"REDIRECTOR_PINS": str(pins), **in_cluster(cluster)}
        # Where nodes have it: cgroup2, and nothing besides.
        volumes = {"state": state, "cgroup": cgroup2_mount()}
        fields = {"spec.nodeName": "node-1"}
        self.flags = flags(AGENT, Places(volumes, environment, fields, account))

    def start(self) -> tuple[Container, Running]:
        """The manifest's command; of the node it sees only what is the test's."""
        container = AGENT.container()
        words = [*container["command"], *container["args"]]
        words += [f"--cgroup-root=/sys/fs/cgroup/{self.ground.node.cgroup.name}", "--resync=0.5"]
        ground = self.ground
        made = start(ground.node, self.home, AGENT_IMAGE, self.flags, words, ground.log)
        ground.stack.callback(made.kill)
        return made, Running(made.process, made.log)

    def command(self, *words: str) -> str:
        """Another container of the same image and with the same mounts, to its end."""
        done = run_to_end(self.home, AGENT_IMAGE, self.flags, "redirector", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def secret(directory: Path, authority: Authority) -> Path:
    """`xds-server-tls`, as the kubelet mounts it: root's, and readable for the pod's group."""
    directory.mkdir()
    leaf = authority.issue(XDS_NAME)
    leaf.write(directory / "tls.crt", directory / "tls.key")
    (directory / "ca.crt").write_bytes(authority.pem)
    (volume,) = (each for each in XDS_SERVER.pod()["volumes"] if "secret" in each)
    for file in directory.iterdir():
        os.chown(file, 0, XDS_SERVER.pod()["securityContext"]["fsGroup"])
        file.chmod(volume["secret"]["defaultMode"])
    return directory


def start_xds_server(
    node: Node, home: LabPod, cluster: ApiServer, place: Path, account: Path, authority: Authority
) -> Container:
    """By the manifest's command; `cluster` listens in its pod, `home`."""
    volumes = {"tls": secret(place / "tls", authority)}
    options = flags(XDS_SERVER, Places(volumes, in_cluster(cluster), {}, account))
    container = XDS_SERVER.container()
    words = [*container["command"], *container["args"]]
    return start(node, home, XDS_IMAGE, options, words, place / "xds.log")


def identity(directory: Path, authority: Authority, namespace: str) -> Path:
    """A sidecar's certificate, as cert-manager's driver mounts it."""
    directory.mkdir()
    name = f"spiffe://cluster.local/ns/{namespace}/sa/default"
    authority.issue(name).write(directory / "tls.crt", directory / "tls.key")
    (directory / "ca.crt").write_bytes(authority.pem)
    return directory
