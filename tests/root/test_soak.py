"""A million short connections leave nothing behind, short-circuited or not."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerated import OUTBOUND, counted

from redirector.datapath.layout import Counter, Room
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod

pytestmark = pytest.mark.root

#: Half of them by IPv4, half by IPv6, at the same time. Those by IPv6 are so brief that most are
#: left out of the sockhash.
CONNECTIONS = 1_000_000
#: Less than a hundred bytes for each connection: a leak of whatever the datapath keeps shows.
SLACK = 64 << 20
SERVICES = {socket.AF_INET: ("10.96.1.1", 80), socket.AF_INET6: ("fd96::1", 80)}
REQUESTS = {socket.AF_INET: 2, socket.AF_INET6: 1}
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


def test_a_million_short_connections(
    pod: LabPod, datapath: Datapath, enrollment: Enrollment
) -> None:
    pod.call(soak, socket.AF_INET, 1000, 2)  # what is allocated once is not counted
    before = entries(enrollment)
    unreclaimed = slab()
    with ThreadPoolExecutor(2) as families:
        runs = [
            families.submit(pod.call, soak, family, CONNECTIONS // 2, requests, timeout=300)
            for family, requests in REQUESTS.items()
        ]
        assert [run.result() for run in runs] == [None, None]
    made = CONNECTIONS + 1000
    counters = counted(datapath, pod)
    assert counters[Counter.STEERED_OUTBOUND] == made
    accelerated = made - counters[Counter.PASSED_BRIEF]
    assert accelerated >= CONNECTIONS // 2 + 1000
    assert counters[Counter.ACCELERATED] == 2 * accelerated
    assert counters[Counter.REDIRECTED_MESSAGES] == 2 * accelerated + CONNECTIONS // 2 + 1000
    # Sockets and their storage are freed a little later (call_rcu).
    deadline = time.monotonic() + 20
    while (entries(enrollment) != before or slab() > unreclaimed + SLACK) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert entries(enrollment) == before
    assert slab() <= unreclaimed + SLACK


def soak(family: int, count: int, requests: int) -> None:
    """`count` connections to a service, one after the other; requests and a reply on each."""
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((ANY[family], OUTBOUND))
        listener.listen()
        for _ in range(count):
            client = socket.socket(family)
            client.connect(SERVICES[family])
            server, _ = listener.accept()
            for _ in range(requests):
                client.send(b"request")
                assert server.recv(16) == b"request"
            server.send(b"reply")
            assert client.recv(16) == b"reply"
            server.close()  # first, so that no port of the client's waits in TIME_WAIT
            assert client.recv(16) == b""
            client.close()


def entries(enrollment: Enrollment) -> dict[str, int]:
    """What is in the maps, and what the programs count as being in that of flows."""
    held = {fill.name: fill.entries for fill in enrollment.node_status().maps}
    return held | {"taken": enrollment.datapath.maps.room(Room.TAKEN)}


def slab() -> int:
    """Bytes that the kernel's allocators hold and cannot give back at will."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("SUnreclaim:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no SUnreclaim in /proc/meminfo")
