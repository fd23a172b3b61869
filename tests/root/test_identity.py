"""Who connects: the effective user and group count, not the real nor the supplementary ones."""

import os
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
