"""Pods with users of their own (`hostUsers: false`): their ids are other numbers to the kernel."""

import ctypes
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import probes
import pytest
from folders import open_folder
from xtables import FLAVOURS, PROGRAMS

from redirector import users
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import NO_ID, Ids, Mode, Steering
from redirector.records import Records
from redirector.steering import Verdict

pytestmark = pytest.mark.root

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
#: The kernel's ids of the pod's root and of its sidecar; and those of groups.
BASE, GROUP_BASE, COUNT = 100_000, 300_000, 65_536
PORT, GROUP = 80, 7
OUTBOUND, INBOUND, DIRECT = Verdict.OUTBOUND, Verdict.INBOUND, Verdict.DIRECT


def hold(ready: int, mapped: int) -> None:
    """In a child: a user namespace, and a network namespace that belongs to it."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for flag in (CLONE_NEWUSER, CLONE_NEWNET):
            if libc.unshare(flag) != 0:
                os._exit(1)
            os.write(ready, b".")
            if flag == CLONE_NEWUSER:
                os.read(mapped, 1)
        signal.pause()
    finally:
        os._exit(1)


@contextmanager
def with_own_users(pod: LabPod) -> Iterator[LabPod]:
    """The pod with its interface in a namespace that a user namespace of its own owns."""
    ready, ready_end = os.pipe()
    mapped_end, mapped = os.pipe()
    pid = os.fork()
    if pid == 0:
        hold(ready_end, mapped_end)
    try:
        assert os.read(ready, 1)
        Path(f"/proc/{pid}/uid_map").write_text(f"0 {BASE} {COUNT}\n")
        Path(f"/proc/{pid}/gid_map").write_text(f"0 {GROUP_BASE} {COUNT}\n")
        os.write(mapped, b".")
        assert os.read(ready, 1)
        pod.run(["ip", "link", "set", "eth0", "netns", str(pid)], check=True)
        made = LabPod(
            pod.name,
            Path(f"/proc/{pid}/ns/net"),
            pod.cgroup,
            ip_address(pod.ip),
            ip_address(pod.ip6),
        )
        for words in (
            "link set lo up",
            "link set eth0 up",
            f"address add {pod.ip}/24 dev eth0",
            f"address add {pod.ip6}/64 dev eth0 nodad",
            "route add default via 10.77.0.1",
            "-6 route add default via fd77::1",
        ):
            made.run(["ip", *words.split()], check=True)
        yield made
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for end in (ready, ready_end, mapped, mapped_end):
            os.close(end)


def verdicts(pod: LabPod, to: str, *who: tuple[int, int]) -> list[Verdict | str]:
    found = []
    for uid, gid in who:
        call = probes.Call(ip_address(to), PORT)
        (arrival,) = pod.call(probes.dial, [call], uid=BASE + uid, gid=GROUP_BASE + gid)
        found.append(arrival.verdict if isinstance(arrival, probes.Arrival) else arrival)
    return found


def check(pod: LabPod, peer: LabPod) -> None:
    app, sidecar, its_group, excluded = (0, 0), (1337, 5), (5, 1337), (5, GROUP)
    for here, there in ((pod.ip, peer.ip), (pod.ip6, peer.ip6)):
        assert verdicts(pod, there, app, sidecar, its_group, excluded) == [
            OUTBOUND,
            DIRECT,
            DIRECT,
            DIRECT,
        ]
        assert verdicts(pod, here, app, sidecar) == [DIRECT, INBOUND]
        (arrival,) = peer.call(probes.dial, [probes.Call(ip_address(here), PORT)])
        assert arrival.verdict == INBOUND
        # The node's own 1337 is nobody there.
        (arrival,) = pod.call(
            probes.dial, [probes.Call(ip_address(there), PORT)], uid=1337, gid=1337
        )
        assert arrival.verdict == OUTBOUND


def enrolled(node: Node, enrollment: Enrollment, mode: Mode) -> None:
    peer = node.pod("peer")
    probes.start(peer, [(DIRECT, PORT)])
    with with_own_users(node.pod("pod")) as pod:
        probes.start(pod, [(OUTBOUND, 15001), (INBOUND, 15006)], sidecar=True)
        probes.start(pod, [(DIRECT, PORT)])
        steering = Steering(exclude_owner_groups=frozenset({GROUP}))
        enrollment.enroll("pod", pod.netns, pod.cgroup, mode, steering=steering)
        check(pod, peer)
        assert enrollment.status()[0].missing == ()
        # Other lists, and the other mode.
        enrollment.update("pod", steering=replace(steering, exclude_outbound_ports=frozenset({9})))
        check(pod, peer)
        (other,) = set(Mode) - {mode}
        enrollment.change_mode("pod", other)
        check(pod, peer)
        enrollment.unenroll("pod")


def test_in_ebpf_mode(node: Node, enrollment: Enrollment) -> None:
    enrolled(node, enrollment, Mode.EBPF)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_in_iptables_mode(
    node: Node, enrollment: Enrollment, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    program = shutil.which(FLAVOURS[flavour], path="/usr/sbin:/sbin")
    assert program, f"{FLAVOURS[flavour]} is not installed: apt-get install iptables"
    with open_folder() as folder:
        for name in PROGRAMS:
            (folder / name).symlink_to(program)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        enrolled(node, enrollment, Mode.IPTABLES)


def test_ids_are_told_and_recorded(node: Node, enrollment: Enrollment, tmp_path: Path) -> None:
    plain = node.pod("plain")
    assert users.ids(plain.netns) == Ids()
    with with_own_users(node.pod("pod")) as pod:
        ids = users.ids(pod.netns)
        assert (ids.user(1337), ids.group(7)) == (BASE + 1337, GROUP_BASE + 7)
        assert ids.user(COUNT) == ids.group(COUNT) == NO_ID
        made = enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
        assert made.ids == ids
        assert Records(tmp_path / "pods").get("pod") == made
        enrollment.unenroll("pod")
