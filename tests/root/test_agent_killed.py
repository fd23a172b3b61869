"""The agent is killed again and again: traffic goes on, the next one repairs."""

import ctypes
import multiprocessing
import random
import time
from ipaddress import ip_address

import pytest
import traces
from agents import Ground, Running, until
from traffic import Phase, Traffic, traffic

from redirector.enrollment import Enrollment
from redirector.model import Mode
from redirector.steering import Verdict

pytestmark = pytest.mark.root

ROUNDS = 12
#: An action takes about 50 ms; kills are spread over twice that.
LONGEST_LIFE_S = 0.1


def wait_for(agent: Running, flow: Traffic) -> None:
    """Until the agent has begun and the traffic has been served once more."""
    before = flow.served.value

    def served() -> bool:
        flow.check()
        return bool(agent.said("started")) and flow.served.value > before

    until(served, agent.log.read_text)


def test_kills_at_random_points(field: Ground, enrollment: Enrollment) -> None:
    """While annotations change, and so the mode; kept connections and new ones never notice."""
    pod, peer = field.pod("pod", 1), field.pod("peer", 0)
    field.pod("last", 3)
    # Asked for and taken back, round by round, so that kills meet enrolments and removals, too.
    field.pod("guest", 2)
    moment = multiprocessing.get_context("fork").Value(ctypes.c_uint64, Phase.ENROLLED)
    asked = {"mode": "ebpf"}
    field.tell("pod", 1, **asked)
    agent = field.start()
    field.until_mode("pod", Mode.EBPF)
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    with traffic(
        pod, [ip_address(peer.ip), ip_address(peer.ip6)], Verdict.OUTBOUND, moment
    ) as flow:
        for number in range(ROUNDS):
            asked = {
                "mode": chance.choice(["ebpf", "iptables"]),
                "excludeOutboundPorts": str(1000 + number),
                "includeOutboundIPRanges": chance.choice(["*", f"{peer.ip}/32,{peer.ip6}/128"]),
            }
            field.tell("pod", 1, **asked)
            field.tell("guest", 2, mode=chance.choice(["ebpf", "iptables", "none"]))
            time.sleep(chance.uniform(0, LONGEST_LIFE_S))
            agent.kill()
            flow.check()
            agent = field.start()
            wait_for(agent, flow)
        field.tell("pod", 1, mode="iptables")
        field.tell("guest", 2, mode="none")
        # Who sees this one has seen all the above, and does it last.
        field.tell("last", 3, mode="iptables")
        field.until_mode("last", Mode.IPTABLES)
        field.until_mode("pod", Mode.IPTABLES)
        field.until_mode("guest", None)
        for unfinished in (enrollment.missing, enrollment.interrupted):
            until(lambda: not any(map(unfinished, enrollment.pods())), field.log.read_text)  # noqa: B023
        flow.check()
    assert traces.in_pod(field.pods["guest"]) == [], seed
    assert not any("CGROUP" in trace for trace in traces.in_pod(pod)), seed
    field.tell("pod", 1, mode="none")
    field.until_mode("pod", None)
    assert traces.in_pod(pod) == [], seed
    agent.stop()
