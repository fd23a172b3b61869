"""Pods are enrolled, moved and released under traffic: no failure, no way past the sidecar."""

import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import probes
import pytest
import traces
from traffic import PORT, Phase, both_ways, busy_pods

from redirector.datapath import libbpf
from redirector.datapath.libbpf import AttachType
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.errors import AlreadyEnrolled, DatapathError, InputError
from redirector.lab import LabPod, Node
from redirector.model import Mode
from redirector.network import netns_cookie
from redirector.steering import Verdict

pytestmark = pytest.mark.root

#: Only a failure waits so long.
PATIENCE_S = 30.0
BRIDGE = "172.17.0.1"


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def test_modes_change_under_traffic(node: Node, enrollment: Enrollment, datapath: Datapath) -> None:
    """none -> ebpf -> iptables -> ebpf -> none, again and again, outbound and inbound."""
    datapath.ensure()
    pod, peer = busy_pods(node)
    with both_ways(pod, peer, Phase.FREE) as busy:
        busy.flow()
        for _ in range(2):
            busy.enter(Phase.CHANGING)
            enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
            busy.enter(Phase.ENROLLED)
            busy.flow()
            for mode in (Mode.IPTABLES, Mode.EBPF):
                enrollment.change_mode("pod", mode)
                busy.flow()
                # A new number, so that a connection of this very mode is kept as well.
                busy.enter(Phase.ENROLLED)
                busy.flow()
            busy.enter(Phase.CHANGING)
            enrollment.unenroll("pod")
            busy.enter(Phase.FREE)
            busy.flow()
            # What keeps the NAT of connections that are still open, and steers nothing.
            assert all("REDIRECTOR_KEEP" in trace for trace in traces.in_pod(pod))

    def released() -> bool:
        enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.IPTABLES)
        enrollment.unenroll("pod")
        return traces.in_pod(pod) == []

    until(released)


@contextmanager
def foreign_program() -> Iterator[int]:
    """A sockops program of somebody else's that does nothing: r0 = 1; exit (linux/bpf.h)."""
    instructions = b"\xb7\0\0\0\1\0\0\0" + b"\x95" + bytes(7)
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    fd = library.bpf_prog_load(13, b"foreign", b"GPL", instructions, ctypes.c_size_t(2), None)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    try:
        yield fd
    finally:
        os.close(fd)


def test_programs_of_others_stay(node: Node, enrollment: Enrollment) -> None:
    pod = node.pod("pod")
    cgroup = os.open(pod.cgroup, os.O_RDONLY)
    with foreign_program() as program:
        link = libbpf.link_create(program, cgroup, AttachType.CGROUP_SOCK_OPS)
        try:
            before = traces.in_pod(pod)
            assert before == ["CGROUP_SOCK_OPS on the cgroup"]
            enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
            assert len(traces.in_pod(pod)) == 8
            enrollment.change_mode("pod", Mode.IPTABLES)
            enrollment.unenroll("pod")
            assert traces.in_pod(pod) == before
        finally:
            os.close(link)
            os.close(cgroup)
    assert traces.in_pod(pod) == []


def test_a_program_that_wants_its_hook_alone_stays_alone(
    node: Node, enrollment: Enrollment, datapath: Datapath
) -> None:
    """Enrolling fails with a name, and what it had attached by then is taken off again."""
    pod = node.pod("pod")
    cgroup = os.open(pod.cgroup, os.O_RDONLY)
    with foreign_program() as program:
        libbpf.prog_attach(program, cgroup, AttachType.CGROUP_SOCK_OPS)
        with pytest.raises(DatapathError, match=f"pod pod: sockops on {pod.cgroup}: "):
            enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
        assert traces.in_pod(pod) == ["CGROUP_SOCK_OPS on the cgroup"]
        assert enrollment.status() == []
        assert datapath.maps.pod(netns_cookie(pod.netns)) is None
        # The other mode needs no such hook.
        enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.IPTABLES)
        with pytest.raises(DatapathError, match="sockops"):
            enrollment.change_mode("pod", Mode.EBPF)
        (status,) = enrollment.status()
        assert (status.pod.mode, status.missing) == (Mode.IPTABLES, ())
    os.close(cgroup)


def test_another_path_of_the_namespace_keeps_a_pod_repairable(
    node: Node, enrollment: Enrollment
) -> None:
    """The process that the namespace was found by ends; others of the pod live on."""
    pod, peer = node.pod("pod"), node.pod("peer")
    first, second = (pod.popen(["sleep", "1000"]) for _ in range(2))
    paths = [Path(f"/proc/{child.pid}/ns/net") for child in (first, second)]
    enrolled = enrollment.enroll("pod", paths[0], pod.cgroup, Mode.EBPF, uid="u-1")
    assert enrollment.missing(enrolled) == ()
    first.kill()
    first.wait()
    assert "No such file" in str(enrollment.missing(enrolled))
    with pytest.raises(InputError, match="is another namespace than was enrolled"):
        enrollment.update("pod", netns=peer.netns)
    updated = enrollment.update("pod", netns=paths[1], mode=Mode.IPTABLES)
    assert enrollment.pods() == [updated]
    assert (updated.netns, updated.uid, updated.mode) == (paths[1], "u-1", Mode.IPTABLES)
    assert enrollment.missing(updated) == ()


def test_an_address_that_comes_later_is_taken_up(node: Node, enrollment: Enrollment) -> None:
    pod = node.pod("pod")
    probes.start(pod, [(Verdict.OUTBOUND, 15001), (Verdict.INBOUND, 15006)], sidecar=True)
    probes.start(pod, [(Verdict.DIRECT, PORT)])
    enrolled = enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
    assert enrollment.missing(enrolled) == ()
    late = ip_address("fd77::7")
    change = ["ip", "-6", "addr", "add", f"{late}/64", "dev", "eth0", "nodad"]
    pod.run(change, check=True)
    assert enrollment.missing(enrolled) == ("its address fd77::7",)
    taken, problems = enrollment.take_over()
    assert ([each.name for each in taken], problems) == (["pod"], [])
    assert late in enrollment.get("pod").addresses
    assert enrollment.missing(enrollment.get("pod")) == ()
    # What the sidecar asks of it comes back through the inbound policy, as of any own address.
    (told,) = pod.call(probes.dial, [probes.Call(late, PORT)], sidecar=True)
    assert told.verdict is Verdict.INBOUND
    pod.run([*change[:3], "del", *change[4:-1]], check=True)
    assert enrollment.missing(enrollment.get("pod")) == ("addresses as they are by now",)
    enrollment.update("pod")
    assert enrollment.missing(enrollment.get("pod")) == ()


def test_pods_do_not_share_a_cgroup(node: Node, enrollment: Enrollment) -> None:
    """The programs of both would run for one connection; the second would lose its destination."""
    pod, peer = node.pod("pod"), node.pod("peer")
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
    for shared in (pod.cgroup, pod.app, pod.cgroup.parent):
        with pytest.raises(AlreadyEnrolled, match=f"cgroup {shared} overlaps .* as pod pod"):
            enrollment.enroll("peer", peer.netns, shared, Mode.EBPF)
    enrollment.enroll("peer", peer.netns, peer.cgroup, Mode.EBPF)


def test_a_cgroup_and_a_namespace_are_of_one_pod(node: Node, enrollment: Enrollment) -> None:
    pod, peer = node.pod("pod"), node.pod("peer")
    pod.popen(["sleep", "1000"])
    stranger = peer.popen(["sleep", "1000"])
    for own in (Path("/proc/self/ns/net"), Path(f"/proc/{os.getpid()}/ns/net")):
        with pytest.raises(InputError, match=f"pod pod: netns {own}: is the node's own"):
            enrollment.enroll("pod", own, pod.cgroup, Mode.IPTABLES)
    for wrong in (peer.cgroup, peer.app):
        with pytest.raises(InputError, match=rf"cgroup {wrong}: none of its .* {stranger.pid}\)"):
            enrollment.enroll("pod", pod.netns, wrong, Mode.EBPF)
    assert traces.in_pod(pod) == traces.in_pod(peer) == []
    # Nobody is in it yet: who comes may be of the pod.
    enrollment.enroll("pod", pod.netns, pod.sidecar, Mode.EBPF)


def test_two_pods_at_one_address_are_not_both_in_ebpf_mode(
    node: Node, enrollment: Enrollment
) -> None:
    """Both ends of a connection know it by the pods' addresses."""
    pod, peer = node.pod("pod"), node.pod("peer")

    def change(verb: str, each: LabPod, ip: str) -> None:
        each.run(["ip", "address", verb, f"{ip}/24", "dev", "eth0"], check=True)

    change("delete", peer, peer.ip)
    change("add", peer, pod.ip)
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
    told = f"pod peer: address {pod.ip} is that of pod pod, too"
    with pytest.raises(AlreadyEnrolled, match=told):
        enrollment.enroll("peer", peer.netns, peer.cgroup, Mode.EBPF)
    assert traces.in_pod(peer) == []
    enrollment.enroll("peer", peer.netns, peer.cgroup, Mode.IPTABLES)
    with pytest.raises(AlreadyEnrolled, match=told):
        enrollment.change_mode("peer", Mode.EBPF)
    assert {each.name: enrollment.missing(each) for each in enrollment.pods()} == {
        "peer": (),
        "pod": (),
    }
    # A forerunner's address goes to its successor before we hear of its end.
    change("delete", pod, pod.ip)
    enrollment.change_mode("peer", Mode.EBPF)


@pytest.mark.parametrize("late", [False, True])
def test_pods_may_have_the_same_address_beside_their_own(
    node: Node, enrollment: Enrollment, late: bool
) -> None:
    """As that of a bridge for their containers, or of a load balancer: it is each one's own."""
    pods = [node.pod("pod"), node.pod("peer")]
    for pod in pods:
        probes.start(pod, [(Verdict.OUTBOUND, 15001), (Verdict.INBOUND, 15006)], sidecar=True)
        probes.start(pod, [(Verdict.DIRECT, PORT)])
    own = [ip_address(BRIDGE), *(ip_address(pod.ip) for pod in pods)]

    def check(pod: LabPod) -> None:
        """What is its own is direct, and comes back through the inbound policy to its sidecar."""
        calls = [probes.Call(ip, PORT) for ip in own if ip in (own[0], ip_address(pod.ip))]
        for who, verdict in ((False, Verdict.DIRECT), (True, Verdict.INBOUND)):
            told = pod.call(probes.dial, calls, sidecar=who)
            assert told == [
                probes.Arrival(verdict, c.destination, PORT, c.destination) for c in calls
            ]

    def give(pod: LabPod, ip: str) -> None:
        pod.run(["ip", "address", "add", f"{ip}/32", "dev", "lo"], check=True)

    for pod in pods:
        if not late:
            give(pod, BRIDGE)
        enrollment.enroll(pod.name, pod.netns, pod.cgroup, Mode.EBPF)
        if late:
            give(pod, BRIDGE)
    # Somebody else's, which it has no business to have.
    give(pods[1], pods[0].ip)
    assert enrollment.take_over()[1] == []
    for pod in pods:
        check(pod)
    enrollment.unenroll(pods[0].name)
    check(pods[1])
    enrollment.update(pods[1].name)  # has it all to itself now
    enrollment.enroll(pods[0].name, pods[0].netns, pods[0].cgroup, Mode.EBPF)
    for pod in pods:
        check(pod)
    enrollment.unenroll(pods[1].name)
    check(pods[0])


def test_another_namespace_under_the_path_is_left_alone(node: Node, enrollment: Enrollment) -> None:
    """A pod is made anew under the same path while its forerunner is still enrolled."""
    old, new = node.pod("old"), node.pod("new")
    path = old.netns.with_name(f"{old.netns.name}-path")
    path.touch()
    try:
        _mount(old.netns, path)
        enrollment.enroll("old", path, old.cgroup, Mode.EBPF)
        _unmount(path)
        _mount(new.netns, path)
        enrollment.enroll("new", path, new.cgroup, Mode.IPTABLES)
        steered = traces.in_pod(new)
        for mode in Mode:
            with pytest.raises(InputError, match="is another namespace than was enrolled"):
                enrollment.change_mode("old", mode)
        missing = {status.pod.name: status.missing for status in enrollment.status()}
        assert missing == {
            "new": (),
            "old": (f"netns {path}: is another namespace than was enrolled",),
        }
        enrollment.unenroll("old")
        assert traces.in_pod(new) == steered != []
        assert traces.in_pod(old) == []
        enrollment.unenroll("new")
    finally:
        _unmount(path)
        path.unlink()


def _mount(netns: Path, path: Path) -> None:
    subprocess.run(["mount", "--bind", netns, path], check=True)


def _unmount(path: Path) -> None:
    subprocess.run(["umount", path], check=True)
