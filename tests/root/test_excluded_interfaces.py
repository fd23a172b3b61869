"""Interfaces that are excluded, in both modes: by route, by the socket's own choice, both ways."""

import socket
from ipaddress import ip_address

import probes
import pytest
from links import FAR, NEAR, second_link

from redirector.enrollment import Enrollment
from redirector.errors import InputError
from redirector.lab import LabPod, Node
from redirector.model import Mode, Steering
from redirector.steering import Verdict

pytestmark = pytest.mark.root

PORT = 80
STEERING = Steering(exclude_interfaces=frozenset({"eth1"}))
DIRECT, OUTBOUND, INBOUND = Verdict.DIRECT, Verdict.OUTBOUND, Verdict.INBOUND


@pytest.fixture
def pods(node: Node) -> tuple[LabPod, LabPod]:
    """One with a second interface, eth1, that leads to the other."""
    pod, other = node.pod("pod"), node.pod("other")
    second_link(pod, "eth1", other)
    probes.start(pod, [(OUTBOUND, 15001), (INBOUND, 15006)], sidecar=True)
    for each in (pod, other):
        probes.start(each, [(DIRECT, PORT)])
    for service in ("10.96.0.1", "10.96.0.2", "10.96.1.1", "fd96::1"):
        other.run(["ip", "route", "add", "local", service, "dev", "lo"], check=True)
    return pod, other


def routed(pod: LabPod, *words: str) -> None:
    pod.run(["ip", "route", *words], check=True)


def reached(pod: LabPod, *destinations: str) -> list[Verdict | str]:
    calls = [probes.Call(ip_address(destination), PORT) for destination in destinations]
    outcomes = pod.call(probes.dial, calls)
    return [each.verdict if isinstance(each, probes.Arrival) else each for each in outcomes]


def bound_to(interface: str, destination: str) -> Verdict:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        one.settimeout(probes.TIMEOUT)
        one.connect((destination, PORT))
        return probes.read_arrival(one).verdict


@pytest.mark.parametrize("mode", Mode)
def test_the_longest_prefix_says_by_which(
    pods: tuple[LabPod, LabPod], enrollment: Enrollment, mode: Mode
) -> None:
    pod, other = pods
    routed(pod, "add", "10.96.0.0/24", "via", FAR[0])
    routed(pod, "add", "10.96.0.2", "via", other.ip)
    routed(pod, "add", "10.96.1.0/24", "via", other.ip)
    routed(pod, "add", "10.96.1.0/24", "via", FAR[0], "metric", "50")
    routed(pod, "add", "fd96::/64", "via", FAR[1])
    enrollment.enroll("pod", pod.netns, pod.cgroup, mode, steering=STEERING)
    through = ("10.96.0.1", "fd96::1", *FAR)
    beside = ("10.96.0.2", "10.96.1.1", other.ip, other.ip6)
    assert reached(pod, *through) == [DIRECT] * len(through)
    assert reached(pod, *beside) == [OUTBOUND] * len(beside)
    assert reached(pod, pod.ip, NEAR[0], "127.0.0.1") == [DIRECT] * 3
    assert pod.call(bound_to, "eth1", FAR[0]) == DIRECT
    assert pod.call(bound_to, "eth1", "10.96.0.1") == DIRECT
    assert reached(other, *NEAR) == [DIRECT] * 2
    assert reached(other, pod.ip, pod.ip6) == [INBOUND] * 2
    # Routes that change are read by `redirector mode`.
    routed(pod, "del", "10.96.0.2")
    enrollment.change_mode("pod", mode)
    assert reached(pod, "10.96.0.2") == [DIRECT]
    enrollment.update("pod", steering=Steering())
    assert reached(pod, "10.96.0.1", *FAR) == [OUTBOUND] * 3
    assert reached(other, *NEAR) == [INBOUND] * 2
    assert enrollment.status()[0].missing == ()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["rule", "add", "fwmark", "7", "table", "main", "priority", "100"],
            "ip rule, priority 100",
        ),
        (["rule", "add", "from", "10.77.0.0/16", "table", "99"], "ip rule"),
        (["-6", "rule", "add", "to", "fd96::/64", "table", "99"], "ip rule"),
        (
            [
                "route",
                "add",
                "10.96.0.0/16",
                "nexthop",
                "via",
                FAR[0],
                "nexthop",
                "via",
                "10.77.0.1",
            ],
            "the route to 10.96.0.0/16 leads through excluded ones and others",
        ),
        (
            ["route", "add", "10.96.0.0/16", "tos", "0x10", "via", FAR[0]],
            "the route to 10.96.0.0/16",
        ),
    ],
)
def test_routing_by_more_than_the_destination_is_refused(
    pods: tuple[LabPod, LabPod], enrollment: Enrollment, words: list[str], told: str
) -> None:
    pod, _ = pods
    pod.run(["ip", *words], check=True)
    where = (pod.netns, pod.cgroup)
    with pytest.raises(InputError, match=f"pod pod: excludeInterfaces: .*{told}.*--mode iptables"):
        enrollment.enroll("pod", *where, Mode.EBPF, steering=STEERING)
    assert enrollment.pods() == []
    # Neither does a change of mode: it stays as it is.
    enrollment.enroll("pod", *where, Mode.IPTABLES, steering=STEERING)
    with pytest.raises(InputError, match=told):
        enrollment.change_mode("pod", Mode.EBPF)
    assert enrollment.get("pod").mode is Mode.IPTABLES
    assert reached(pod, FAR[0]) == [DIRECT]
