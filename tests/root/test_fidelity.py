"""What both ends of a steered connection are told of it: the same in both modes."""

from dataclasses import replace
from ipaddress import IPv4Network, IPv6Address, ip_address

import probes
import pytest
from xtables import as_pod

from redirector.lab import Node
from redirector.model import EVERYWHERE, IPAddress, Steering
from redirector.modes.base import ModeDriver
from redirector.steering import Verdict

pytestmark = pytest.mark.root

PORT = 80
OUTBOUND, INBOUND = Verdict.OUTBOUND, Verdict.INBOUND
Name = tuple[str, int]


def names(destination: str) -> tuple[Name, Name, probes.Arrival]:
    """Connect; the peer's name, the socket's own, and what the sidecar knows."""
    connection, arrival = probes.connect(probes.Call(ip_address(destination), PORT))
    with connection:
        return connection.getpeername()[:2], connection.getsockname()[:2], arrival


def unmapped(text: str) -> IPAddress:
    ip = ip_address(text)
    return (ip.ipv4_mapped or ip) if isinstance(ip, IPv6Address) else ip


def test_names_and_addresses(node: Node, driver: ModeDriver) -> None:
    pod = node.pod("pod")
    probes.start(pod, [(OUTBOUND, 15001), (INBOUND, 15006)], sidecar=True)
    # A range inside loopback is captured where it is named.
    loopback = IPv4Network("127.1.0.0/16")
    steering = Steering(include_outbound_cidrs=(*EVERYWHERE, loopback))
    enrolled = replace(as_pod(pod, steering), mode=driver.mode)
    expected = [
        # destination, of whom, own address, listener
        ("10.96.0.1", 0, pod.ip, OUTBOUND),
        ("fd96::1", 0, pod.ip6, OUTBOUND),
        ("::ffff:10.96.0.1", 0, f"::ffff:{pod.ip}", OUTBOUND),
        ("127.1.2.3", 0, "127.0.0.1", OUTBOUND),
        (pod.ip, 1337, pod.ip, INBOUND),
        (pod.ip6, 1337, pod.ip6, INBOUND),
        (f"::ffff:{pod.ip}", 1337, f"::ffff:{pod.ip}", INBOUND),
        ("127.0.0.2", 1337, "127.0.0.1", INBOUND),
    ]
    driver.install(enrolled)
    try:
        for destination, uid, own, verdict in expected:
            peer, name, arrival = pod.call(names, destination, uid=uid, gid=uid)
            assert peer == (destination, PORT)
            assert name[0] == own
            assert arrival.verdict == verdict
            assert (unmapped(str(arrival.destination)), arrival.port) == (
                unmapped(destination),
                PORT,
            )
            assert unmapped(str(arrival.client)) == unmapped(own), destination
    finally:
        driver.remove(enrolled)


def test_the_server_sees_the_caller(node: Node, driver: ModeDriver) -> None:
    pod, other = node.pod("pod"), node.pod("other")
    probes.start(pod, [(OUTBOUND, 15001), (INBOUND, 15006)], sidecar=True)
    probes.start(other, [(Verdict.DIRECT, PORT)])
    enrolled = replace(as_pod(pod), mode=driver.mode)
    driver.install(enrolled)
    try:
        for here, there in ((pod.ip, other.ip), (pod.ip6, other.ip6)):
            # The sidecar's own connection, and one from outside.
            peer, name, arrival = pod.call(names, there, uid=1337, gid=1337)
            assert (peer, name[0], str(arrival.client)) == ((there, PORT), here, here)
            assert arrival.verdict == Verdict.DIRECT
            peer, name, arrival = other.call(names, here)
            assert (peer, name[0], str(arrival.client)) == ((here, PORT), there, there)
            assert (arrival.verdict, str(arrival.destination), arrival.port) == (
                INBOUND,
                here,
                PORT,
            )
    finally:
        driver.remove(enrolled)
