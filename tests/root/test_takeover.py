"""Another version takes over a running one, and back: no connection fails or gets past the sidecar.

The other versions are real ones: copies of this one with something changed.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import probes
import pytest
import traces
from sockets import pod_socket
from traffic import Busy, Phase, both_ways, busy_pods
from waiting import PATIENCE_S, eventually

from redirector.datapath.layout import PodFlag, Room, Side
from redirector.datapath.pins import Datapath
from redirector.lab import LabPod, Node
from redirector.machine import ensure_bpffs
from redirector.network import netns_cookie

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Version:
    """An installation of the product, and the node that it works on."""

    place: Path
    state: Path
    pins: Path

    def start(self, *arguments: str | Path) -> "subprocess.Popen[str]":
        """Begin a command, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "redirector.cli", *arguments],
            env=os.environ
            | {
                "PYTHONPATH": str(self.place),
                "REDIRECTOR_STATE": str(self.state),
                "REDIRECTOR_PINS": str(self.pins),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def do(self, *arguments: str | Path, code: int = 0) -> str:
        """Run a command to its end; what it prints."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (arguments, out, err)
        return out


@dataclass(frozen=True)
class Versions:
    """This version, one with other programs, one with another layout of maps."""

    shipped: Version
    programs: Version
    layout: Version

    @property
    def pins(self) -> Path:
        return self.shipped.pins


@pytest.fixture
def versions(tmp_path: Path) -> Iterator[Versions]:
    state = tmp_path / "state"
    pins = ensure_bpffs() / f"rdrtest-takeover-{random.randbytes(3).hex()}"

    def copy(name: str, *edits: tuple[str, str, str]) -> Version:
        place = tmp_path / name
        for part in ("redirector", "bpf"):
            shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file, before, after in edits:
            path = place / file
            assert before in path.read_text()
            path.write_text(path.read_text().replace(before, after, 1))
        return Version(place, state, pins)

    made = Versions(
        copy("shipped"),
        copy("programs", ("bpf/sockops/connect.c", "\treturn connect4(ctx);", NO_OP)),
        copy(
            "layout",
            ("bpf/sockops/layout.h", "struct flow {", "struct flow {\n\t__u64 added;"),
            ("redirector/datapath/layout.py", FLOW, f'{FLOW}\n        ("added", ctypes.c_uint64),'),
            # The key is larger, too: what comes first in it is found elsewhere.
            ("bpf/sockops/layout.h", "struct flow_key {", "struct flow_key {\n\t__u64 added;"),
            ("redirector/datapath/layout.py", KEY, f'{KEY}\n        ("added", ctypes.c_uint64),'),
        ),
    )
    try:
        yield made
    finally:
        made.shipped.start("uninstall").communicate()
        Datapath(pins).unload()


NO_OP = '\tasm volatile("" ::: "memory");\n\treturn connect4(ctx);'
FLOW = '    c_name = "flow"\n    _fields_ = ('
KEY = '    c_name = "flow_key"\n    _fields_ = ('


@contextmanager
def busy(node: Node, enroll: Callable[[LabPod], object]) -> Iterator[Busy]:
    """An enrolled pod under traffic from and to it."""
    pod, peer = busy_pods(node)
    enroll(pod)
    with both_ways(pod, peer, Phase.ENROLLED, names=True) as made:
        made.flow()
        yield made


def by(version: Version) -> Callable[[LabPod], object]:
    def enroll(pod: LabPod) -> None:
        place = ("--netns", pod.netns, "--cgroup", pod.cgroup)
        version.do("enroll", "pod", *place, "--mode", "ebpf", "--accelerate", "on")

    return enroll


def generations(versions: Versions) -> int:
    return len([path for path in versions.pins.iterdir() if path.name != "pods"])


def is_whole(version: Version) -> bool:
    process = version.start("status")
    out, _ = process.communicate()
    assert process.returncode == ("INCOMPLETE" in out), out
    assert process.returncode == 0 or "lacks this version's programs; repair" in out
    return process.returncode == 0


def test_versions_take_over_under_traffic(node: Node, versions: Versions) -> None:
    kept = Datapath(versions.pins)
    with busy(node, by(versions.shipped)) as there:
        cookie = netns_cookie(there.pod.netns)

        def replies() -> dict[bytes, int]:
            """What has been short-circuited back on the connections that this version keeps."""
            return {
                bytes(found.key): found.flow.messages[Side.SERVER]
                for found in kept.maps.flows_of(cookie)
            }

        assert "every pod runs this version's programs" in versions.shipped.do("takeover")
        first = replies()
        for version, standing in (
            (versions.programs, 1),
            (versions.layout, 2),
            (versions.programs, 2),
            (versions.shipped, 2),
        ):
            assert not is_whole(version)
            told = version.do("takeover")
            assert "pod pod taken over\n" in told
            assert ("still need an older version's maps" in told) == (standing > 1)
            # Connections of this version stay, too, through all that follow.
            there.enter(Phase.ENROLLED)
            there.flow()
            assert is_whole(version)
            assert generations(versions) == standing
            now = replies()
            lasting = [key for key, before in first.items() if now.get(key, 0) > before]
            # Those that were open in the beginning are still short-circuited.
            assert len(lasting) >= 2
            first = {key: now[key] for key in lasting}
    # With the last connection of the other version its maps go.
    eventually("the end of all connections", lambda: not replies())
    assert kept.maps.room(Room.TAKEN) == 0
    versions.shipped.do("takeover")
    assert generations(versions) == 1
    versions.shipped.do("uninstall")
    assert traces.in_pod(there.pod) + traces.in_files(versions.pins, versions.shipped.state) == []


def test_a_takeover_that_is_killed_can_be_tried_again(node: Node, versions: Versions) -> None:
    """At whatever moment it dies, the pod stays steered by the one version or the other."""
    chance = random.Random(7)
    with busy(node, by(versions.shipped)) as there:
        for turn in range(6):
            version = (versions.layout, versions.shipped, versions.programs)[turn % 3]
            process = version.start("takeover")
            time.sleep(chance.uniform(0.0, 1.2))
            # The loader goes with it or outlives it, in turns.
            target = os.kill if turn % 2 else os.killpg
            target(process.pid, signal.SIGKILL)
            process.communicate()
            there.enter(Phase.ENROLLED)
            there.flow()
            if turn % 4 == 2:
                version.do("takeover")
                assert is_whole(version)
                there.flow()
        versions.layout.do("takeover")
        there.flow()
        assert is_whole(versions.layout)
        versions.shipped.do("uninstall")
    assert traces.in_pod(there.pod) + traces.in_files(versions.pins, versions.shipped.state) == []


def test_a_connection_on_its_way_arrives(node: Node, versions: Versions) -> None:
    """Its SYN was steered by the older version and comes again, to the newer one's hook."""
    pod = node.pod("pod")
    cookie = netns_cookie(pod.netns)
    newer = Datapath(versions.pins)

    def marked() -> bool:
        entry = newer.maps.pod(cookie)
        return entry is not None and bool(entry.flags & PodFlag.TAKEOVER)

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(pod_socket(pod, sidecar=True))
        listener.bind(("0.0.0.0", 15001))
        listener.listen(0)
        listener.settimeout(PATIENCE_S)  # a SYN comes again after 1, 3, 7, ... seconds
        by(versions.layout)(pod)
        clients = {n: stack.enter_context(pod_socket(pod)) for n in range(2)}
        for n, client in clients.items():
            client.setblocking(False)
            client.connect_ex(("198.51.100.7", 8000 + n))
        # One fits into the queue of a listener that accepts none yet.
        assert connected(*clients.values()) == 1
        versions.shipped.do("takeover")
        assert marked()
        originals = set()
        for _ in clients:
            accepted = stack.enter_context(listener.accept()[0])
            raw = accepted.getsockopt(socket.SOL_IP, probes.SO_ORIGINAL_DST, 16)
            originals.add(struct.unpack_from("!H", raw, 2)[0])
        assert originals == {8000, 8001}
        # All have been told of by now.
        versions.shipped.do("takeover")
        assert not marked()
        assert generations(versions) == 2
        refused = stack.enter_context(pod_socket(pod))
        assert refused.connect_ex((pod.ip, 15001)) == errno.ECONNREFUSED
    eventually("the older maps to go", lambda: gone(versions))
    versions.shipped.do("unenroll", "pod")


def connected(*clients: socket.socket) -> int:
    """How many have an established connection."""
    tcp_info, established = 11, 1  # linux/tcp.h, include/net/tcp_states.h
    infos = (client.getsockopt(socket.IPPROTO_TCP, tcp_info, 1) for client in clients)
    return sum(info[0] == established for info in infos)


def gone(versions: Versions) -> bool:
    versions.shipped.do("takeover")
    return generations(versions) == 1


def test_an_agent_of_another_version_takes_over(node: Node, versions: Versions) -> None:
    with busy(node, by(versions.shipped)) as there:
        agent = versions.layout.start("run", "--no-kubernetes")
        try:
            eventually("the takeover", lambda: is_whole(versions.layout))
            there.flow()
        finally:
            agent.terminate()
            agent.communicate()
    versions.layout.do("uninstall")


def test_who_follows_is_told_of_pods_that_another_version_steers(
    node: Node, versions: Versions
) -> None:
    pod = node.pod("pod")
    by(versions.shipped)(pod)
    follower = versions.shipped.start("flows", "--follow")
    try:
        assert follower.stdout is not None
        assert follower.stderr is not None
        versions.layout.do("takeover")
        told = "redirector: not shown, steered by another version's programs until"
        assert follower.stderr.readline().startswith(told)
        versions.shipped.do("takeover")
        followers = Datapath(versions.pins).followers()
        assert followers is not None
        eventually("a follower", lambda: followers.sweep() == 1)
        pod.call(probes.dial, [probes.Call(ip_address("10.96.1.1"), 80)])
        assert "10.96.1.1:80  outbound by outbound.included-cidr" in follower.stdout.readline()
    finally:
        follower.terminate()
        out, err = follower.communicate(timeout=20)
    assert (follower.returncode, out, err) == (0, "", "")
    versions.shipped.do("uninstall")


def test_uninstall_finds_what_another_version_left(node: Node, versions: Versions) -> None:
    pod = node.pod("pod")
    by(versions.shipped)(pod)
    versions.layout.do("takeover")
    versions.programs.do("uninstall")
    assert traces.in_pod(pod) + traces.in_files(versions.pins, versions.shipped.state) == []
