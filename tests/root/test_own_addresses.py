"""Which addresses are the pod's own, and which of them it is known by: the same in both modes."""

import socket
from dataclasses import replace
from ipaddress import ip_address

import probes
import pytest
from xtables import as_pod

from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import IPAddress, Mode
from redirector.modes.base import ModeDriver
from redirector.steering import Verdict

pytestmark = pytest.mark.root

PORT = 80
DIRECT, OUTBOUND, INBOUND = Verdict.DIRECT, Verdict.OUTBOUND, Verdict.INBOUND
#: Of a load balancer that answers to the client directly, and of a metadata service, say.
VIRTUAL, VIRTUAL6, METADATA = "10.5.5.5", "fd55::5", "169.254.20.10"
SERVICE, SERVICE6 = "10.96.0.1", "fd96::1"


def give(pod: LabPod, address: str, device: str) -> None:
    pod.run(["ip", "address", "add", address, "dev", device, "nodad"], check=True)


def serve(pod: LabPod) -> None:
    probes.start(pod, [(OUTBOUND, 15001), (INBOUND, 15006)], sidecar=True)
    probes.start(pod, [(DIRECT, PORT)])


def test_addresses_on_loopback_and_of_links(node: Node, driver: ModeDriver) -> None:
    pod = node.pod("pod")
    give(pod, f"{VIRTUAL}/32", "lo")
    give(pod, f"{VIRTUAL6}/128", "lo")
    give(pod, f"{METADATA}/32", "lo")
    serve(pod)
    expected = [
        # from, to, of whom, listener, seen as
        (None, SERVICE, 0, OUTBOUND, pod.ip),
        (None, SERVICE6, 0, OUTBOUND, pod.ip6),
        (VIRTUAL, SERVICE, 0, OUTBOUND, VIRTUAL),
        (METADATA, SERVICE, 0, OUTBOUND, METADATA),
        (None, VIRTUAL, 0, DIRECT, VIRTUAL),
        (None, VIRTUAL6, 0, DIRECT, VIRTUAL6),
        (None, METADATA, 0, DIRECT, METADATA),
        (METADATA, pod.ip, 0, DIRECT, METADATA),
        (pod.ip, METADATA, 0, DIRECT, pod.ip),
        (None, METADATA, 1337, INBOUND, METADATA),
        (METADATA, pod.ip, 1337, INBOUND, METADATA),
        (METADATA, VIRTUAL, 1337, INBOUND, METADATA),
    ]
    enrolled = replace(as_pod(pod), mode=driver.mode)
    driver.install(enrolled)
    try:
        for source, destination, uid, verdict, client in expected:
            call = probes.Call(
                ip_address(destination), PORT, ip_address(source) if source else None
            )
            (arrival,) = pod.call(probes.dial, [call], uid=uid, gid=uid)
            assert arrival == probes.Arrival(verdict, call.destination, PORT, ip_address(client)), (
                call,
                uid,
            )
    finally:
        driver.remove(enrolled)


@pytest.mark.parametrize("mode", list(Mode))
def test_a_pod_whose_only_ipv4_address_is_of_its_link(
    node: Node, enrollment: Enrollment, mode: Mode
) -> None:
    """So do clusters of IPv6 give their pods a way to IPv4; the address repeats on each node."""
    pods = [node.pod("a"), node.pod("b")]
    for pod in pods:
        pod.run(["ip", "-4", "address", "flush", "dev", "eth0"], check=True)
        give(pod, f"{METADATA}/22", "eth0")
        pod.run(["ip", "route", "replace", "default", "dev", "eth0"], check=True)
        serve(pod)
        enrollment.enroll(pod.name, pod.netns, pod.cgroup, mode)
    for pod in pods:
        for to, client in ((SERVICE, METADATA), (SERVICE6, pod.ip6)):
            (arrival,) = pod.call(probes.dial, [probes.Call(ip_address(to), PORT)])
            assert arrival == probes.Arrival(OUTBOUND, ip_address(to), PORT, ip_address(client))
        (own,) = pod.call(probes.dial, [probes.Call(ip_address(METADATA), PORT)])
        assert isinstance(own, probes.Arrival), own
        assert own.verdict == DIRECT
    # What one has is not the other's when that one goes.
    enrollment.unenroll(pods[0].name)
    (own,) = pods[1].call(probes.dial, [probes.Call(ip_address(METADATA), PORT)])
    assert isinstance(own, probes.Arrival), own
    assert own.verdict == DIRECT


def dial_of_link(destination: IPAddress) -> probes.Arrival:
    with socket.socket(socket.AF_INET6) as connection:
        connection.settimeout(probes.TIMEOUT)
        connection.connect((str(destination), PORT, 0, socket.if_nametoindex("eth0")))
        return probes.read_arrival(connection)


def test_the_application_reaches_its_own_address_of_an_ipv6_link(
    node: Node, driver: ModeDriver
) -> None:
    pod = node.pod("pod")
    own = "fe80::7"
    give(pod, f"{own}/64", "eth0")
    serve(pod)
    enrolled = replace(as_pod(pod), mode=driver.mode)
    driver.install(enrolled)
    try:
        arrival = pod.call(dial_of_link, ip_address(own))
        assert (arrival.verdict, arrival.client) == (DIRECT, ip_address(own))
        if driver.mode is Mode.EBPF:  # such a socket is bound to its device: iptables loses it
            arrival = pod.call(dial_of_link, ip_address(own), uid=1337, gid=1337)
            assert (arrival.verdict, arrival.client) == (INBOUND, ip_address(own))
    finally:
        driver.remove(enrolled)
