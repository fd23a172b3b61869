"""What both ends of a steered connection are told of it: the same in both modes."""

import errno
import socket
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


def of_mapped(call: probes.Call) -> probes.Arrival:
    """Call, by a socket of IPv6 though the addresses are of IPv4."""
    with socket.socket(socket.AF_INET6) as connection:
        connection.settimeout(probes.TIMEOUT)
        if call.source is not None:
            connection.bind((f"::ffff:{call.source}", 0))
        mapped = call.destination.version == 4
        connection.connect((f"{'::ffff:' if mapped else ''}{call.destination}", call.port))
        return probes.read_arrival(connection)


def test_the_unspecified_address(node: Node, driver: ModeDriver) -> None:
    """It leads to the address that the socket is bound to, else to localhost."""
    pod = node.pod("pod")
    probes.start(pod, [(OUTBOUND, 15001), (INBOUND, 15006)], sidecar=True)
    probes.start(pod, [(Verdict.DIRECT, PORT)])
    any4, any6, own = (ip_address(text) for text in ("0.0.0.0", "::", pod.ip))
    bound, free = probes.Call(any4, PORT, own), probes.Call(any4, PORT)
    enrolled = replace(as_pod(pod), mode=driver.mode)
    driver.install(enrolled)
    try:
        for uid, call, verdict in (
            (0, free, Verdict.DIRECT),
            (0, bound, Verdict.DIRECT),
            (1337, free, Verdict.DIRECT),
            (1337, bound, INBOUND),
        ):
            to = own if call.source else ip_address("127.0.0.1")
            (plain,) = pod.call(probes.dial, [call], uid=uid, gid=uid)
            mapped = pod.call(of_mapped, call, uid=uid, gid=uid)
            for arrival in (plain, mapped):
                assert isinstance(arrival, probes.Arrival), (uid, call, arrival)
                assert arrival.verdict == verdict, (uid, call)
                assert (unmapped(str(arrival.destination)), arrival.port) == (to, PORT)
        arrival = pod.call(of_mapped, probes.Call(any6, PORT))
        assert (arrival.verdict, str(arrival.destination)) == (Verdict.DIRECT, "::1")
    finally:
        driver.remove(enrolled)


def failure_of_mapped(call: probes.Call) -> str:
    try:
        return str(of_mapped(call))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))


@pytest.mark.parametrize("without", [4, 6])
def test_no_address_of_a_family(node: Node, driver: ModeDriver, without: int) -> None:
    """A pod cannot connect by a family of which it has no address; by the other it is steered."""
    pod = node.pod("pod")
    pod.run(["ip", f"-{without}", "address", "flush", "dev", "eth0"], check=True)
    pod.run(["ip", f"-{without}", "route", "flush", "default"], check=True)
    probes.start(pod, [(OUTBOUND, 15001), (INBOUND, 15006)], sidecar=True)
    enrolled = replace(as_pod(pod), mode=driver.mode)
    assert {ip.version for ip in enrolled.addresses} == {10 - without}
    call4, call6 = (probes.Call(ip_address(text), PORT) for text in ("10.96.0.1", "fd96::1"))
    driver.install(enrolled)
    try:
        for call in (call4, call6):
            (outcome,) = pod.call(probes.dial, [call])
            if call.destination.version == without:
                assert outcome == "ENETUNREACH"
                assert pod.call(failure_of_mapped, call) == "ENETUNREACH"
            else:
                assert isinstance(outcome, probes.Arrival), outcome
                assert (outcome.verdict, outcome.destination) == (OUTBOUND, call.destination)
    finally:
        driver.remove(enrolled)


def test_who_is_many_is_unreachable(node: Node, driver: ModeDriver) -> None:
    pod = node.pod("pod")
    probes.start(pod, [(OUTBOUND, 15001), (INBOUND, 15006)], sidecar=True)
    many = [ip_address(text) for text in ("224.0.0.1", "239.1.2.3", "255.255.255.255", "ff05::1")]
    enrolled = replace(as_pod(pod), mode=driver.mode)
    driver.install(enrolled)
    try:
        calls = [probes.Call(ip, PORT) for ip in many]
        assert pod.call(probes.dial, calls) == ["ENETUNREACH"] * len(many)
    finally:
        driver.remove(enrolled)
