"""The agent's image, run as its DaemonSet says: all that a node's agent is for."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import apiserver
import pytest
import yaml
from agents import Ground, Running
from apiserver import ApiServer
from containers import (
    AGENT_IMAGE,
    Container,
    Places,
    container_flags,
    flags,
    run_to_end,
    start,
)
from deployed import AGENT
from waiting import eventually

from redirector.datapath.pins import Datapath
from redirector.lab import Node
from redirector.machine import ensure_bpffs
from redirector.model import Mode
from redirector.network import within
from redirector.records import Records
from redirector.steering import Verdict

pytestmark = pytest.mark.root

INSTALL = Path(__file__).parents[2] / "docs" / "install.md"
(METRICS,) = (port["containerPort"] for port in AGENT.container()["ports"])


class Site:
    """A node for the agent's pod, and the agent in it."""

    def __init__(self, node: Node, cluster: ApiServer, place: Path, account: Path) -> None:
        self.home = node.pod("agent")
        within(self.home.netns, cluster.up)
        cluster.put("namespaces", apiserver.namespace("default"))
        state = place / "state"
        state.mkdir()
        pins = ensure_bpffs() / f"{node.name}-image"
        self.ground = Ground(node, cluster, Records(state / "pods"), pins, place / "log")
        environment = {
            "NODE_NAME": "node-1",
            "REDIRECTOR_PINS": str(pins),
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(cluster.port),
        }
        self.flags = flags(AGENT, Places({"state": state}, environment, account))

    def start(self) -> tuple[Container, Running]:
        """The manifest's command; of the node it sees only what is the test's."""
        container = AGENT.container()
        words = [*container["command"], *container["args"]]
        words += ["--cgroup-root", str(self.ground.node.cgroup), "--resync", "0.5"]
        made = start(AGENT_IMAGE, self.home, self.flags, words, self.ground.log)
        self.ground.stack.callback(made.kill)
        return made, Running(made.process, made.log)

    def command(self, *words: str) -> str:
        """Another container of the same image and with the same mounts, to its end."""
        done = run_to_end(AGENT_IMAGE, self.home, self.flags, "redirector", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def site(node: Node, cluster: ApiServer, place: Path, account: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        made = Site(node, cluster, place, account)
        stack.callback(Datapath(made.ground.pins).unload)
        stack.enter_context(made.ground.stack)
        yield made


def await_container() -> dict[str, Any]:
    """The init container that the page for installers tells of."""
    found = re.search(r"^    initContainers:\n(?:      .*\n)+", INSTALL.read_text(), re.M)
    assert found
    (made,) = yaml.safe_load(found[0])["initContainers"]
    return dict(made)


def test_nothing_is_missing_in_it(site: Site) -> None:
    assert "missing" not in site.command("check")


def test_it_does_what_a_nodes_agent_does(site: Site, cluster: ApiServer) -> None:
    ground = site.ground
    peer = ground.pod("peer", 0)
    for number, mode in enumerate(Mode, 1):
        ground.pod(mode, number)
        ground.tell(mode, number, mode=mode)
    ground.pod("bad", 8)
    ground.tell("bad", 8, mode="ebpf", excludeOutboundPorts="70000")
    container, agent = site.start()
    container.until_probed(AGENT)

    def outbound(verdict: Verdict) -> None:
        assert {mode: ground.verdict(mode, peer) for mode in Mode} == dict.fromkeys(Mode, verdict)

    for mode in Mode:
        ground.until_mode(mode, mode)
    outbound(Verdict.OUTBOUND)
    assert ground.verdict("bad", peer) is Verdict.DIRECT
    # What it asks for is what it is granted.
    cluster.wait_for(lambda: bool(cluster.events))
    asked = {(each.verb, each.resource) for each in list(cluster.requests)}
    assert asked == AGENT.allowed()
    # What an operator looks at.
    told = container.run("redirector", "status")
    assert "pod default/bad: redirector.io/excludeOutboundPorts: '70000'" in told.stdout
    assert {f"default/{mode}" for mode in Mode} <= set(re.findall(r"default/\w+", told.stdout))
    assert "INCOMPLETE" not in told.stdout
    assert container.run("redirector", "flows").returncode == 0
    metrics = container.ask(METRICS, "/metrics")[1]
    assert (
        'redirector_agent_pod_problem{namespace="default",pod="bad",reason="refused"} 1' in metrics
    )
    assert not container.out_of_memory
    said = [line["message"] for line in agent.lines() if line["level"] == "error"]
    assert said == []

    # Traffic does not notice that it goes and that another one comes.
    before = ground.record("ebpf")
    assert container.stop(AGENT) == 0
    assert [line["message"] for line in agent.lines()][-1] == "stopped; pods stay as they are"
    outbound(Verdict.OUTBOUND)
    ground.tell("iptables", 2)
    container, agent = site.start()
    ground.until_mode("iptables", None)
    container.until_probed(AGENT)
    assert ground.record("ebpf") == before
    changed = [line for line in agent.lines() if "pod" in line and line["level"] == "info"]
    assert [(line["message"], line["pod"]) for line in changed] == [
        ("unenroll", "default/iptables")
    ]
    assert ground.verdict("ebpf", peer) is Verdict.OUTBOUND

    # And how it is taken away.
    assert container.stop(AGENT) == 0
    site.command("uninstall")
    outbound(Verdict.DIRECT)
    assert not ground.pins.exists()


def test_a_pods_start_is_held_until_it_is_steered(site: Site, place: Path) -> None:
    """By the init container as it is shown to installers, in another container's network."""
    ground = site.ground
    pod = ground.pod("pod", 1, listen=False)
    pod.run(["ip", "route", "replace", "default", "via", str(ground.node.subnet[1])], check=True)
    # The sandbox's own process, by which the agent finds the network.
    pod.popen(["sleep", "1000"])
    given = await_container()
    log = place / "await.log"
    waiting = start(AGENT_IMAGE, pod, container_flags({}, given, Places()), given["command"], log)
    ground.stack.callback(waiting.kill)
    # A kubelet puts it into the pod's cgroup at once.
    pid = eventually("its process", lambda: _pid(waiting))
    (pod.app / "cgroup.procs").write_text(str(pid))
    assert waiting.process.poll() is None, log.read_text()
    site.start()
    ground.tell("pod", 1, mode="ebpf")
    assert waiting.process.wait(60) == 0, log.read_text()
    assert log.read_text().startswith("steered after ")


def _pid(container: Container) -> int:
    try:
        return container.pid
    except ValueError:
        return 0
