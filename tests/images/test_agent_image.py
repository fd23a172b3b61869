"""The agent's image, run as its DaemonSet says: all that a node's agent is for."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from apiserver import ApiServer
from containers import AGENT_IMAGE, start
from deployed import AGENT
from deployments import Site
from waiting import eventually

from redirector.model import Mode
from redirector.steering import Verdict

pytestmark = pytest.mark.root

INSTALL = Path(__file__).parents[2] / "docs" / "install.md"
(METRICS,) = (port["containerPort"] for port in AGENT.container()["ports"])


def uninstalling() -> dict[str, Any]:
    """The DaemonSet's container, patched as installers are told to (RFC 6902)."""
    found = re.search(r"--type=json -p '(\[.*?\n.*?\])'$", INSTALL.read_text(), re.M | re.S)
    assert found
    patched = copy.deepcopy(AGENT.one("DaemonSet"))
    for change in json.loads(found[1]):
        *parents, name = change["path"].split("/")[1:]
        where = patched
        for parent in parents:
            where = where[int(parent) if parent.isdigit() else parent]
        assert name in where
        del where[name]
        if change["op"] == "replace":
            where[name] = change["value"]
    (container,) = patched["spec"]["template"]["spec"]["containers"]
    assert "startupProbe" not in container
    assert "livenessProbe" not in container
    return dict(container)


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
    last = uninstalling()
    words = [*last["command"], *last["args"]]
    container = start(ground.node, site.home, AGENT_IMAGE, site.flags, words, ground.log)
    ground.stack.callback(container.kill)
    probe = last["readinessProbe"]["exec"]["command"]
    eventually("its end", lambda: container.run(*probe).returncode == 0)
    assert container.process.poll() is None
    outbound(Verdict.DIRECT)
    assert not ground.pins.exists()
