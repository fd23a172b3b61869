"""What the hand-made node promises: pods that talk, the right user and cgroup, and no leftovers."""

import errno
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from redirector.errors import InputError
from redirector.lab import LabPod, Node
from redirector.machine import cgroup2_mount

pytestmark = pytest.mark.root


def leftovers(name: str) -> list[Path]:
    places = [Path("/run/netns"), cgroup2_mount()]
    return [entry for place in places for entry in place.glob(f"{name}*")]


def whoami() -> tuple[int, int, list[int], str, str]:
    own = Path("/proc/self/cgroup").read_text().split("0::", 1)[1].splitlines()[0]
    return os.getuid(), os.getgid(), os.getgroups(), own, os.readlink("/proc/self/ns/net")


def ask(address: str) -> bytes:
    with socket.create_connection((address, 8000), timeout=5) as connection:
        return connection.recv(100)


def greet_once(family: socket.AddressFamily, ready: int) -> str:
    with socket.create_server(("", 8000), family=family) as server:
        os.write(ready, b"r")
        server.settimeout(5)
        connection, peer = server.accept()
        with connection:
            connection.sendall(b"hello")
        return str(peer[0])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_pods_reach_each_other(node: Node, family: socket.AddressFamily) -> None:
    client, server = node.pod("client"), node.pod("server")
    reader, writer = os.pipe()
    peers: list[str] = []
    thread = threading.Thread(
        target=lambda: peers.append(server.call(greet_once, family, writer)), daemon=True
    )
    thread.start()
    assert os.read(reader, 1) == b"r"
    v6 = family == socket.AF_INET6
    assert client.call(ask, server.ip6 if v6 else server.ip) == b"hello"
    thread.join(10)
    assert peers == [client.ip6 if v6 else client.ip]
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("address", ["10.96.0.1", "fd96::1"])
def test_a_cluster_ip_is_answered_unreachable(node: Node, address: str) -> None:
    unreachable = f"Errno ({errno.EHOSTUNREACH}|{errno.ENETUNREACH})"
    with pytest.raises(OSError, match=unreachable):
        node.pod("client").call(ask, address)


def test_the_parts_have_their_own_user_and_cgroup(node: Node) -> None:
    pod = node.pod("web")
    inode = pod.netns.stat().st_ino
    cgroup = f"/{node.name}/web"
    netns = f"net:[{inode}]"
    assert pod.call(whoami) == (0, 0, os.getgroups(), f"{cgroup}/app", netns)
    assert pod.call(whoami, sidecar=True) == (1337, 1337, [], f"{cgroup}/sidecar", netns)
    shell = "id -u; id -g; cat /proc/self/cgroup"
    output = pod.run(["sh", "-c", shell], uid=1000, gid=1001).stdout.splitlines()
    assert output[:2] == ["1000", "1001"]
    assert f"0::{cgroup}/app" in output


def test_an_error_in_a_call_comes_back(node: Node) -> None:
    pod = node.pod("web")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pod.call(Path("/nowhere").read_text)
    with pytest.raises(ChildProcessError, match="exit code 7"):
        pod.call(os._exit, 7)
    with pytest.raises(TimeoutError, match="did not return"):
        pod.call(threading.Event().wait, timeout=0.05)


def test_cpu_time_is_counted_for_each_part(node: Node) -> None:
    pod = node.pod("web")

    def burn() -> float:
        while os.times().user < 0.05:
            sum(range(1000))
        return os.times().user

    pod.call(burn)
    assert pod.cpu_usec("app") >= 50_000
    assert pod.cpu_usec() >= pod.cpu_usec("app")
    assert pod.cpu_usec("sidecar") < pod.cpu_usec("app")


def test_programs_are_pinned(node: Node) -> None:
    pod = node.pod("web")
    output = pod.run(["grep", "Cpus_allowed_list", "/proc/self/status"], cpus={1}).stdout
    assert output.split() == ["Cpus_allowed_list:", "1"]


def test_addresses_are_chosen_and_checked(node: Node) -> None:
    first = node.pod("a")
    assert (first.ip, first.ip6) == ("10.77.0.10", "fd77::a")
    assert node.pod("b", ip="10.77.0.11").ip == "10.77.0.11"
    assert node.pod("c").ip == "10.77.0.12"
    for ip in ("10.77.0.11", "10.77.0.1", "10.78.0.1"):
        with pytest.raises(InputError, match=ip):
            node.pod("d", ip=ip)
    with pytest.raises(InputError, match="'a' is on node"):
        node.pod("a")


def start_stubborn(pod: LabPod) -> "subprocess.Popen[bytes]":
    """A program that ignores SIGTERM and has a child of its own."""
    child = pod.popen(
        ["sh", "-c", "trap '' TERM; echo ready; sleep 600 & wait; sleep 600"],
        sidecar=True,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def test_nothing_is_left(node: Node) -> None:
    start = start_stubborn(node.pod("web"))
    (node.pods["web"].app / "made-by-a-program").mkdir()
    name = node.name
    assert leftovers(name)
    node.close()
    assert leftovers(name) == []
    assert start.returncode == -9
    node.close()


def test_nothing_is_left_after_an_exception() -> None:
    name = ""

    def fail() -> None:
        nonlocal name
        with Node(prefix="rdrtest") as node:
            name = node.name
            start_stubborn(node.pod("web"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert name
    assert leftovers(name) == []
