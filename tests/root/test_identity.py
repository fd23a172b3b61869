"""Who owns a socket: the effective user and group of who made it, not the real nor others."""

import os
import socket
from dataclasses import replace
from ipaddress import ip_address

import probes
import pytest
from xtables import as_pod

from redirector.lab import Node
from redirector.model import Steering
from redirector.modes.base import ModeDriver
from redirector.steering import Verdict

pytestmark = pytest.mark.root

SERVICE = probes.Call(ip_address("10.96.0.1"), 80)
PROXY, CHOSEN, OTHER = 1337, 4242, 4343
DIRECT, OUTBOUND = Verdict.DIRECT, Verdict.OUTBOUND


def dial_as(user: int, group: int, others: list[int], call: probes.Call) -> probes.Arrival | str:
    """Connect as root who has taken on another user and group, as a setuid program does."""
    os.setgroups(others)
    os.setresgid(-1, group, -1)
    os.setresuid(-1, user, -1)
    (outcome,) = probes.dial([call])
    return outcome


def dial_by_another(maker: int, caller: int, call: probes.Call) -> str:
    """Make a socket as one user and connect it as another; who accepted the connection."""
    os.setresuid(-1, maker, -1)
    with socket.socket() as connection:
        os.setresuid(-1, 0, -1)
        os.setresuid(-1, caller, -1)
        connection.settimeout(probes.TIMEOUT)
        connection.connect((str(call.destination), call.port))
        return probes.read_arrival(connection).verdict


def ask_by_another(maker: int, caller: int, call: probes.Call) -> str:
    """The same with a datagram."""
    os.setresuid(-1, maker, -1)
    with socket.socket(type=socket.SOCK_DGRAM) as asking:
        os.setresuid(-1, 0, -1)
        os.setresuid(-1, caller, -1)
        return probes.ask(asking, call.destination, call.port).verdict


@pytest.mark.parametrize(
    ("steering", "expected"),
    [
        (
            Steering(),
            {(0, 0): OUTBOUND, (PROXY, 0): DIRECT, (0, PROXY): DIRECT, (0, 0, PROXY): OUTBOUND},
        ),
        (
            Steering(exclude_owner_groups=frozenset({CHOSEN})),
            {(0, CHOSEN): DIRECT, (0, 0, CHOSEN): OUTBOUND, (CHOSEN, 0): OUTBOUND},
        ),
        (
            Steering(include_owner_groups=frozenset({CHOSEN, OTHER})),
            {(0, CHOSEN): OUTBOUND, (0, OTHER): OUTBOUND, (0, 0): DIRECT, (0, 0, CHOSEN): DIRECT},
        ),
        (
            Steering(
                include_owner_groups=frozenset({CHOSEN, OTHER}),
                exclude_owner_groups=frozenset({OTHER}),
            ),
            {(0, CHOSEN): OUTBOUND, (0, OTHER): DIRECT},
        ),
    ],
    ids=["proxy", "excluded", "included", "both"],
)
def test_the_effective_ids_count(
    node: Node,
    driver: ModeDriver,
    steering: Steering,
    expected: dict[tuple[int, ...], Verdict],
) -> None:
    lab, peer = node.pod("pod"), node.pod("peer")
    peer.run(["ip", "route", "add", "local", "10.96.0.1", "dev", "lo"], check=True)
    lab.run(["ip", "route", "add", "10.96.0.1", "via", peer.ip], check=True)
    probes.start(peer, [(DIRECT, SERVICE.port)])
    probes.start(lab, [(OUTBOUND, steering.outbound_port)], sidecar=True)
    pod = replace(as_pod(lab, steering), mode=driver.mode)
    driver.install(pod)
    try:
        for (user, group, *others), verdict in expected.items():
            outcome = lab.call(dial_as, user, group, others, SERVICE)
            assert isinstance(outcome, probes.Arrival), outcome
            assert outcome.verdict == verdict, (user, group, others)
    finally:
        driver.remove(pod)


def test_who_made_the_socket_owns_it(node: Node, driver: ModeDriver) -> None:
    pod, peer = node.pod("pod"), node.pod("peer")
    query = probes.Call(ip_address(peer.ip), 53)
    probes.start(peer, [(DIRECT, SERVICE.port), (DIRECT, query.port)])
    probes.start(pod, [(OUTBOUND, 15001), (Verdict.DNS, 15053)], sidecar=True)
    enrolled = replace(as_pod(pod, Steering(dns_capture=True, dns_servers=None)), mode=driver.mode)
    web = replace(SERVICE, destination=query.destination)
    driver.install(enrolled)
    try:
        assert pod.call(dial_by_another, 0, PROXY, web) == OUTBOUND
        assert pod.call(dial_by_another, PROXY, 0, web) == DIRECT
        assert pod.call(ask_by_another, 0, PROXY, query) == Verdict.DNS
        assert pod.call(ask_by_another, PROXY, 0, query) == DIRECT
    finally:
        driver.remove(enrolled)
