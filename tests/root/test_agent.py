"""The agent keeps a node's pods steered as Kubernetes asks for it."""

import json
import os
import subprocess
import sys
import time
from ipaddress import IPv4Address
from pathlib import Path

import apiserver
import pytest
from agents import PATIENCE_S, PORT, UID, Ground, until
from apiserver import Fault
from deployed import AGENT

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.model import Accelerate, Mode
from redirector.processes import processes
from redirector.steering import Verdict

pytestmark = pytest.mark.root

MEBIBYTE = 1 << 20


def empty(cgroup: Path) -> None:
    """End a pod's containers as the kubelet does."""
    (cgroup / "cgroup.kill").write_text("1")
    until(lambda: not processes(cgroup))


def test_pods_are_steered_as_annotated(field: Ground) -> None:
    peer = field.pod("peer", 0)
    for number, name in enumerate(("one", "two", "three"), 1):
        field.pod(name, number)
    field.server.put("namespaces", apiserver.namespace("default", mode="iptables"))
    field.tell("one", 1, mode="ebpf", accelerate="off", excludeOutboundPorts="81")
    field.tell("two", 2)
    field.tell("three", 3, mode="none")
    agent = field.start("--default-accelerate", "on")
    field.until_mode("one", Mode.EBPF)
    field.until_mode("two", Mode.IPTABLES)
    record, other = field.record("one"), field.record("two")
    assert record is not None
    assert other is not None
    assert (record.uid, record.accelerate) == (UID % 1, Accelerate.OFF)
    assert other.accelerate is Accelerate.ON
    assert record.steering.exclude_outbound_ports == {81}
    assert field.verdict("one", peer) is Verdict.OUTBOUND
    assert field.verdict("two", peer) is Verdict.OUTBOUND
    assert field.verdict("three", peer) is Verdict.DIRECT
    until(lambda: agent.get("/readyz")[0] == 200)

    # What is asked for changes.
    field.tell("one", 1, mode="iptables", excludeOutboundPorts=f"{PORT}")
    field.tell("three", 3, mode="ebpf")
    field.until_mode("one", Mode.IPTABLES)
    field.until_mode("three", Mode.EBPF)
    assert field.verdict("one", peer) is Verdict.DIRECT
    assert field.verdict("three", peer) is Verdict.OUTBOUND
    field.server.put("namespaces", apiserver.namespace("default"))
    field.until_mode("two", None)
    assert field.verdict("two", peer) is Verdict.DIRECT
    # A line for each change, and no more.
    assert [(line["message"], line["pod"]) for line in agent.lines() if "pod" in line] == [
        ("enroll", "default/one"),
        ("enroll", "default/two"),
        ("update", "default/one"),
        ("enroll", "default/three"),
        ("unenroll", "default/two"),
    ]


def test_the_end_of_pods(field: Ground) -> None:
    peer = field.pod("peer", 0)
    for number, name in enumerate(("deleted", "finished", "again"), 1):
        field.pod(name, number)
        field.tell(name, number, mode="ebpf")
    agent = field.start()
    for name in ("deleted", "finished", "again"):
        field.until_mode(name, Mode.EBPF)

    # Gone from the API, but its containers still run.
    field.server.delete("pods", "default/deleted")
    done = apiserver.pod("finished", UID % 2, annotations={"mode": "ebpf"})
    done["status"]["phase"] = "Succeeded"
    field.server.put("pods", done)
    field.until_mode("finished", None)
    assert field.verdict("deleted", peer) is Verdict.OUTBOUND
    empty(field.pods["deleted"].cgroup)
    field.until_mode("deleted", None)

    # A static pod whose mirror is made anew: its UID is another, its cgroup's is not.
    field.pod("static", 7)
    for uid in ("mirror-1", "mirror-2"):
        mirror = apiserver.pod("static", uid, annotations={"mode": "ebpf"})
        mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"] = UID % 7
        field.server.put("pods", mirror)
        field.until_mode("static", Mode.EBPF)
    # Another pod of the same name.
    field.server.delete("pods", "default/again")
    field.pod("other", 9)
    field.tell("again", 9, mode="ebpf")
    until(lambda: (record := field.record("again")) and record.uid == UID % 9)
    field.until_mode("again", Mode.EBPF)
    assert field.verdict("other", peer) is Verdict.OUTBOUND
    assert [line["message"] for line in agent.lines() if line.get("pod") == "default/static"] == [
        "enroll"
    ]


def test_a_pod_that_waits_begins_steered(field: Ground) -> None:
    """Its first process is the init container that `redirector await` is for."""
    field.start()
    pod = field.pod("pod", 1, listen=False)
    pod.run(["ip", "route", "replace", "default", "via", str(field.node.subnet[1])], check=True)
    command = [sys.executable, "-m", "redirector.cli", "await"]
    waiting = pod.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    field.tell("pod", 1, mode="ebpf")
    out, err = waiting.communicate(timeout=PATIENCE_S)
    assert (waiting.returncode, err) == (0, "")
    assert out.startswith("steered after ")


def test_a_mistyped_annotation_refuses_its_pod(field: Ground) -> None:
    peer = field.pod("peer", 0)
    for number, name in enumerate(("good", "bad", "later"), 1):
        field.pod(name, number)
    field.tell("good", 1, mode="ebpf")
    field.tell("bad", 2, mode="ebpf", excludeOutboundPorts="70000")
    field.tell("later", 3, mode="ebpf")
    agent = field.start()
    field.until_mode("good", Mode.EBPF)
    field.until_mode("later", Mode.EBPF)
    text = (
        "pod default/bad: redirector.io/excludeOutboundPorts: '70000' is not a port; "
        "give a number from 1 to 65535"
    )
    until(lambda: field.server.events)
    (event,) = field.server.events
    assert (event["message"], event["reason"]) == (text, "SteeringRefused")
    assert event["involvedObject"]["uid"] == UID % 2
    assert field.verdict("bad", peer) is Verdict.DIRECT
    assert field.records.problems() == {"default/bad": text}

    # What is enrolled keeps its last good steering.
    field.tell("later", 3, mode="ebpf", includeOutboundIPRanges="10.0.0.0/33")
    until(lambda: len(field.server.events) == 2)
    record = field.record("later")
    assert record is not None
    assert record.steering.include_outbound_cidrs[0].prefixlen == 0
    assert field.verdict("later", peer) is Verdict.OUTBOUND
    _, metrics = agent.get("/metrics")
    for name in ("bad", "later"):
        sample = (
            f'redirector_agent_pod_problem{{namespace="default",pod="{name}",reason="refused"}}'
        )
        assert f"{sample} 1.0" in metrics
    status = field.command("status")
    assert status.returncode == 1
    assert f"default/bad  not enrolled\n  NOT AS ASKED: {text}\n" in status.stdout
    shown = json.loads(field.command("status", "-o", "json").stdout)
    assert {pod["name"]: pod["problem"] for pod in shown} == {
        "default/good": None,
        **field.records.problems(),
    }
    # Once, not with every look.
    assert len(agent.said(text)) == 1
    assert len(agent.said("10.0.0.0/33")) == 1

    field.tell("bad", 2, mode="iptables")
    field.tell("later", 3, mode="ebpf", includeOutboundIPRanges="10.0.0.0/8")
    field.until_mode("bad", Mode.IPTABLES)
    until(lambda: field.records.problems() == {})
    assert field.verdict("bad", peer) is Verdict.OUTBOUND
    assert len(field.server.events) == 2


@pytest.mark.parametrize("mode", list(Mode))
def test_what_its_manifest_grants_is_all_it_needs(field: Ground, mode: Mode) -> None:
    """Its capabilities, loading the programs included, and its calls of the API server."""
    peer = field.pod("peer", 0)
    field.pod("pod", 1)
    field.pod("bad", 2)
    field.tell("pod", 1, mode=mode)
    field.tell("bad", 2, mode="on")
    field.pins = field.pins.with_name(f"{field.pins.name}-own")
    try:
        kept = ",".join(f"+{name.lower()}" for name in AGENT.capabilities())
        agent = field.start(under=["setpriv", f"--bounding-set=-all,{kept}"])
        field.until_mode("pod", mode)
        assert field.verdict("pod", peer) is Verdict.OUTBOUND
        until(lambda: field.server.events)
        field.pods["pod"].run(["iptables", "-t", "nat", "-F"], check=True)
        field.tell("pod", 1, mode="none")
        field.until_mode("pod", None)
        assert field.verdict("pod", peer) is Verdict.DIRECT
        asked = {(request.verb, request.resource) for request in field.server.requests}
        assert asked == AGENT.allowed()
        agent.stop()
    finally:
        Datapath(field.pins).unload()


def test_an_api_server_that_misbehaves_removes_nothing(field: Ground) -> None:
    peer = field.pod("peer", 0)
    field.pod("kept", 1)
    field.tell("kept", 1, mode="ebpf")
    agent = field.start()
    field.until_mode("kept", Mode.EBPF)
    agent.kill()

    # A new agent meets a server that is down, then one that answers nonsense.
    field.server.down()
    agent = field.start()
    until(lambda: agent.said("API server"), field.log.read_text)
    assert agent.get("/readyz")[0] == 503
    assert agent.get("/healthz")[0] == 200
    assert "redirector_agent_api_up 0.0" in agent.get("/metrics")[1]
    for resource in ("pods", "namespaces"):
        field.server.fail("list", resource, Fault.GARBAGE)
    field.server.fail("watch", "pods", Fault.NONSENSE)
    field.server.up()
    until(lambda: agent.get("/readyz")[0] == 200, field.log.read_text)
    assert field.verdict("kept", peer) is Verdict.OUTBOUND
    # A server that has lost everything: the containers run, so the pod stays.
    field.server.objects["pods"].clear()
    field.server.history.clear()
    field.server.forget()
    field.pod("new", 2)
    field.tell("new", 2, mode="ebpf")
    field.until_mode("new", Mode.EBPF)
    assert field.mode("kept") is Mode.EBPF
    assert [line for line in agent.lines() if line["message"] == "unenroll"] == []


@pytest.mark.parametrize("mode", list(Mode))
def test_what_somebody_takes_away_is_put_back(field: Ground, mode: Mode, pins: Path) -> None:
    peer = field.pod("peer", 0)
    pod = field.pod("pod", 1)
    field.tell("pod", 1, mode=mode)
    agent = field.start()
    field.until_mode("pod", mode)
    if mode is Mode.EBPF:
        Datapath(pins).forget("default%2fpod")
    else:
        pod.run(["iptables", "-t", "nat", "-F"], check=True)
    until(lambda: agent.said("repair"), field.log.read_text)
    assert field.verdict("pod", peer) is Verdict.OUTBOUND


def test_a_pod_is_found_again_when_its_first_process_ends(field: Ground) -> None:
    peer = field.pod("peer", 0)
    pod = field.pod("pod", 1, listen=False)
    first = pod.popen(["sleep", "1000"])
    field.tell("pod", 1, mode="iptables")
    field.start()
    field.until_mode("pod", Mode.IPTABLES)
    record = field.record("pod")
    assert record is not None
    assert record.netns == Path(f"/proc/{first.pid}/ns/net")
    field.pods["pod"] = pod
    second = pod.popen(["sleep", "1000"])
    first.kill()
    first.wait()
    until(lambda: (field.record("pod") or record).netns == Path(f"/proc/{second.pid}/ns/net"))
    assert field.verdict("pod", peer) == "ECONNREFUSED"


def test_a_pod_that_cannot_be_found_is_told_of(field: Ground) -> None:
    """Kubelets may have their cgroups elsewhere; that must not look like an idle agent."""
    field.pod("pod", 1)
    field.tell("pod", 1, mode="ebpf")
    elsewhere = field.node.pod("elsewhere").cgroup
    agent = field.start("--cgroup-root", str(elsewhere))
    until(field.records.problems, field.log.read_text)
    (text,) = field.records.problems().values()
    assert f"no cgroup of UID {UID % 1} with a network of its own is below {elsewhere}" in text
    assert len(agent.said("--cgroup-root")) == 1
    assert field.mode("pod") is None


def test_resolvers_are_the_pods_own(field: Ground, tmp_path: Path) -> None:
    """dnsCapture without dnsServers: a pod is steered once a container knows its resolvers."""
    pod = field.pod("pod", 1, listen=False)

    def container(name: str, begin: str) -> None:
        script = f"mount -t tmpfs none /etc && {begin} && touch {tmp_path}/{name}; exec sleep 1000"
        pod.popen(["unshare", "--mount", "sh", "-c", script])
        until((tmp_path / name).exists)

    container("sandbox", "true")
    field.tell("pod", 1, mode="iptables", dnsCapture="true")
    agent = field.start()
    until(lambda: agent.get("/readyz")[0] == 200)
    assert field.mode("pod") is None
    container("app", "echo nameserver 10.96.0.10 > /etc/resolv.conf")
    field.until_mode("pod", Mode.IPTABLES)
    record = field.record("pod")
    assert record is not None
    assert record.steering.dns_servers == (IPv4Address("10.96.0.10"),)
    # As asked for: nothing is changed again and again.
    until(lambda: len(agent.said("enroll")) == 1)
    looks = record, agent.said("update")
    time.sleep(1.2)
    assert (field.record("pod"), agent.said("update")) == looks == (record, [])


def test_a_sandbox_that_is_made_anew(field: Ground) -> None:
    """The same pod in another namespace: its cgroup stays, every process is another."""
    peer = field.pod("peer", 0)
    pod = field.pod("pod", 1)
    other = field.node.pod("sandbox")
    field.tell("pod", 1, mode="ebpf")
    field.start()
    field.until_mode("pod", Mode.EBPF)
    empty(pod.cgroup)
    other.app, other.sidecar = pod.app, pod.sidecar
    other.popen(["sleep", "1000"])
    before = field.record("pod")
    until(lambda: (field.record("pod") or before) != before)
    field.until_mode("pod", Mode.EBPF)
    field.pods["pod"] = other
    assert field.verdict("pod", peer) == "ECONNREFUSED"


def test_pods_enrolled_by_hand_are_left_alone(field: Ground, enrollment: Enrollment) -> None:
    peer = field.pod("peer", 0)
    hand, both = field.pod("hand", 1), field.pod("both", 2)
    enrollment.enroll("hand", hand.netns, hand.cgroup, Mode.IPTABLES)
    enrollment.enroll("default/both", both.netns, both.cgroup, Mode.EBPF)
    field.tell("both", 2, mode="iptables")
    agent = field.start()
    until(lambda: field.server.events)
    assert "was enrolled by hand" in field.server.events[0]["message"]
    assert field.mode("both") is Mode.EBPF
    agent.stop()

    # Without Kubernetes they are the agent's to keep whole.
    agent = field.start(kubernetes=False)
    until(lambda: agent.get("/readyz")[0] == 200)
    hand.run(["iptables", "-t", "nat", "-F"], check=True)
    until(lambda: agent.said("repair", pod="hand"), field.log.read_text)
    field.pods["hand"] = hand
    assert field.verdict("hand", peer) is Verdict.OUTBOUND
    assert field.mode("both") is Mode.EBPF


def test_it_is_small_and_ends_at_once(field: Ground) -> None:
    """Resident memory with everything imported and 20 pods enrolled: at most 64 MiB."""
    for number in range(20):
        pod = field.pod(f"pod{number}", number, listen=False)
        pod.popen(["sleep", "1000"])
        field.tell(f"pod{number}", number, mode="iptables" if number % 2 else "ebpf")
    agent = field.start()
    until(lambda: len(field.records.paths()) == 20, field.log.read_text)
    for _ in range(3):
        assert agent.get("/metrics")[0] == 200
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    (resident,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    assert int(resident) * 1024 <= 64 * MEBIBYTE, f"{int(resident) / 1024:.1f} MiB"
    agent.stop()
    assert len(field.records.paths()) == 20
    assert all(mode is not None for mode in map(field.mode, field.pods))
    assert os.path.exists(f"/proc/{agent.process.pid}") is False
