"""The iptables mode's options on the real kernel, with both flavours of iptables."""

import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, ip_address, ip_network

import probes
import pytest
from links import second_link
from waiting import eventually
from xtables import as_pod, saved

from redirector.lab import LabPod, Node
from redirector.model import IPAddress, Steering
from redirector.modes.iptables.driver import IptablesMode
from redirector.network import within
from redirector.steering import Protocol, Verdict

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("path")]

DRIVER = IptablesMode()
PORTS = (53, 80)
RESOLVER_HERE = "127.0.0.53"
TCP, UDP = Protocol.TCP, Protocol.UDP


@dataclass(frozen=True)
class World:
    """A pod with its sidecar, a resolver that it is told of, and one that it is not."""

    pod: LabPod
    resolver: LabPod
    stranger: LabPod

    def ask(
        self, destination: str, protocol: Protocol, port: int = 53, uid: int = 0, gid: int = 0
    ) -> probes.Arrival:
        call = probes.Call(ip_address(destination), port, protocol=protocol)
        (arrival,) = self.pod.call(probes.dial, [call], uid=uid, gid=gid)
        assert isinstance(arrival, probes.Arrival), arrival
        # TCP's listeners and UDP's clients both see whom the connection was meant for.
        assert (arrival.destination, arrival.port) == (call.destination, port)
        return arrival

    def verdicts(self, destination: str, **caller: int) -> list[Verdict]:
        return [self.ask(destination, each, **caller).verdict for each in (TCP, UDP)]

    @contextmanager
    def steered(self, **options: object) -> Iterator[None]:
        pod = as_pod(self.pod, Steering(**options))  # type: ignore[arg-type]
        DRIVER.install(pod)
        try:
            assert DRIVER.missing(pod) == []
            yield
        finally:
            DRIVER.remove(pod)
        assert "REDIRECTOR" not in saved(self.pod)

    @property
    def resolvers(self) -> tuple[IPAddress, ...]:
        told = (self.resolver.ip, self.resolver.ip6, RESOLVER_HERE)
        return tuple(ip_address(address) for address in told)


@pytest.fixture
def world(node: Node) -> World:
    made = World(node.pod("pod"), node.pod("resolver"), node.pod("stranger"))
    listeners = [(Verdict.OUTBOUND, 15001), (Verdict.INBOUND, 15006), (Verdict.DNS, 15053)]
    probes.start(made.pod, listeners, sidecar=True)
    for each in (made.pod, made.resolver, made.stranger):
        probes.start(each, [(Verdict.DIRECT, port) for port in (*PORTS, 15008)])
    return made


def test_dns_of_the_resolvers_goes_to_the_sidecar(world: World) -> None:
    dns, direct, outbound = Verdict.DNS, Verdict.DIRECT, Verdict.OUTBOUND
    with world.steered(dns_capture=True, dns_servers=world.resolvers):
        for resolver in (world.resolver.ip, world.resolver.ip6, RESOLVER_HERE):
            assert world.verdicts(resolver) == [dns, dns]
            assert world.verdicts(resolver, uid=1337) == [direct, direct]
            assert world.verdicts(resolver, gid=1337) == [direct, direct]
        for other in (world.stranger.ip, world.stranger.ip6):
            assert world.verdicts(other) == [outbound, direct]
        assert world.verdicts(world.resolver.ip, port=80) == [outbound, direct]
    for resolver in (world.resolver.ip, world.resolver.ip6, RESOLVER_HERE):
        assert world.verdicts(resolver) == [direct, direct]


def test_dns_of_anybody(world: World) -> None:
    with world.steered(dns_capture=True, dns_servers=None):
        for other in (world.stranger.ip, world.stranger.ip6, "127.0.0.1", "::1", world.pod.ip):
            assert world.verdicts(other) == [Verdict.DNS] * 2


def test_what_turns_dns_capture_off(world: World) -> None:
    resolver = world.resolver.ip
    with world.steered(dns_capture=True, dns_servers=()):
        assert world.verdicts(resolver) == [Verdict.OUTBOUND, Verdict.DIRECT]
    with world.steered(
        dns_capture=True, dns_servers=world.resolvers, exclude_outbound_ports=frozenset({53})
    ):
        assert world.verdicts(resolver) == [Verdict.DIRECT, Verdict.DIRECT]
    with world.steered(
        dns_capture=True, dns_servers=world.resolvers, exclude_owner_groups=frozenset({7})
    ):
        assert world.verdicts(resolver, gid=7) == [Verdict.DIRECT, Verdict.DIRECT]
        assert world.verdicts(resolver) == [Verdict.DNS] * 2


def from_port(world: World, port: int, uid: int) -> Callable[[], Verdict]:
    """Ask the resolver from a source port."""

    def ask() -> Verdict:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.bind(("0.0.0.0", port))
            return probes.ask(one, ip_address(world.resolver.ip), 53).verdict

    return lambda: world.pod.call(ask, uid=uid, gid=uid)


def test_the_sidecars_own_question_from_an_applications_port_is_direct(world: World) -> None:
    app, sidecar = (from_port(world, 5353, uid) for uid in (0, 1337))
    with world.steered(dns_capture=True, dns_servers=world.resolvers):
        for _ in range(2):
            assert app() == Verdict.DNS
            assert sidecar() == Verdict.DIRECT


def test_a_socket_that_asked_before_follows_every_change(world: World) -> None:
    resolver = ip_address(world.resolver.ip)
    captured = {"dns_capture": True, "dns_servers": world.resolvers}

    def ask_on(one: socket.socket) -> Verdict:
        arrival = probes.ask(one, resolver, 53)
        assert (arrival.destination, arrival.port) == (resolver, 53)
        return arrival.verdict

    call = probes.Call(resolver, 80)
    one = within(world.pod.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with one:
        assert ask_on(one) == Verdict.DIRECT
        pod = as_pod(world.pod, Steering(**captured))  # type: ignore[arg-type]
        for _ in range(2):
            DRIVER.install(pod)
            assert ask_on(one) == Verdict.DNS
            # An open connection keeps NAT going; the datagrams must not be held by that.
            kept, arrival = within(world.pod.netns, partial(probes.connect, call))
            with kept:
                assert arrival.verdict == Verdict.OUTBOUND
                DRIVER.remove(pod)
                assert "REDIRECTOR_KEEP" in saved(world.pod)
                assert "REDIRECTOR_DNS" not in saved(world.pod)
                assert ask_on(one) == Verdict.DIRECT
                assert probes.echo(kept, b"still here") == b"still here"


def test_what_was_asked_while_half_the_rules_stood_is_captured_next(world: World) -> None:
    """Such as by an enrolment that was killed: the zone is there, the redirection is not."""
    pod = as_pod(world.pod, Steering(dns_capture=True, dns_servers=world.resolvers))
    zone = ["OUTPUT", "-p", "udp", "--dport", "53", "-j", "CT", "--zone", "15053"]
    for program, address in (("iptables", world.resolver.ip), ("ip6tables", world.resolver.ip6)):
        resolver = ip_address(address)
        family = socket.AF_INET if resolver.version == 4 else socket.AF_INET6
        with within(world.pod.netns, partial(socket.socket, family, socket.SOCK_DGRAM)) as one:
            world.pod.run([program, "-t", "raw", "-A", *zone], check=True)
            # conntrack tracks where a rule needs it.
            world.pod.run([program, "-t", "nat", "-A", "OUTPUT", "-j", "RETURN"], check=True)
            assert probes.ask(one, resolver, 53).verdict == Verdict.DIRECT
            world.pod.run([program, "-t", "raw", "-D", *zone], check=True)
            DRIVER.install(pod)
            world.pod.run([program, "-t", "nat", "-D", "OUTPUT", "-j", "RETURN"], check=True)
            assert probes.ask(one, resolver, 53).verdict == Verdict.DNS
            DRIVER.remove(pod)


def test_an_answer_on_its_way_arrives_after_removal(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redirector.modes.iptables.driver.DRAIN_SECONDS", probes.TIMEOUT)
    lab, resolver = node.pod("pod"), node.pod("resolver")
    target = (resolver.ip, 53)
    pod = as_pod(lab, Steering(dns_capture=True, dns_servers=None))

    def datagrams() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(probes.TIMEOUT)
        return made

    with (
        within(lab.netns, datagrams) as sidecar,
        within(lab.netns, datagrams) as app,
        ThreadPoolExecutor(1) as pool,
    ):
        sidecar.bind(("127.0.0.1", 15053))
        DRIVER.install(pod)
        app.sendto(b"who?", target)
        _, client = sidecar.recvfrom(100)
        removal = pool.submit(DRIVER.remove, pod)
        eventually("the removal of rules", lambda: "REDIRECTOR_OUTPUT" not in saved(lab))
        assert not removal.done()
        # Nobody's question is captured any more, though an answer is still awaited.
        probes.start(resolver, [(Verdict.DIRECT, 53)])
        assert lab.call(probes.dial, [direct_question(resolver)])[0].verdict == Verdict.DIRECT
        sidecar.sendto(b"I.", client)
        assert app.recvfrom(100) == (b"I.", target)
        removal.result(timeout=probes.TIMEOUT)
    assert "REDIRECTOR" not in saved(lab)


def direct_question(resolver: LabPod) -> probes.Call:
    return probes.Call(ip_address(resolver.ip), 53, protocol=UDP)


def test_dns_over_tcp_that_is_open_survives_removal(world: World) -> None:
    pod = as_pod(world.pod, Steering(dns_capture=True, dns_servers=world.resolvers))
    for resolver in (world.resolver.ip, world.resolver.ip6):
        DRIVER.install(pod)
        call = probes.Call(ip_address(resolver), 53)
        connection, arrival = within(world.pod.netns, partial(probes.connect, call))
        with connection:
            assert arrival.verdict == Verdict.DNS
            DRIVER.remove(pod)
            assert probes.echo(connection, b"still here") == b"still here"
            assert world.verdicts(resolver) == [Verdict.DIRECT] * 2


def test_missing_names_what_of_other_tables_somebody_took_away(world: World) -> None:
    pod = as_pod(
        world.pod, Steering(dns_capture=True, dns_servers=world.resolvers, drop_invalid=True)
    )
    DRIVER.install(pod)
    world.pod.run(["iptables", "-t", "raw", "-F", "OUTPUT"], check=True)
    world.pod.run(["ip6tables", "-t", "raw", "-D", "REDIRECTOR_DNS", "1"], check=True)
    world.pod.run(["ip6tables", "-t", "mangle", "-F"], check=True)
    assert DRIVER.missing(pod) == [
        "IPv4 jump from chain OUTPUT of table raw",
        "IPv6 rule dns-answer in chain REDIRECTOR_DNS",
        "IPv6 rule drop-invalid in chain REDIRECTOR_DROP",
        "IPv6 jump from chain PREROUTING of table mangle",
    ]
    DRIVER.install(pod)
    assert DRIVER.missing(pod) == []
    DRIVER.remove(pod)
    assert "REDIRECTOR" not in saved(world.pod)


@pytest.mark.parametrize(
    ("options", "steered"),
    [
        ({"include_owner_groups": frozenset({0, 7})}, {0, 7}),
        ({"include_owner_groups": frozenset()}, set()),
        ({"exclude_owner_groups": frozenset({0, 7})}, {8}),
        (
            {
                "include_owner_groups": frozenset({0, 7}),
                "exclude_owner_groups": frozenset({7}),
            },
            {0},
        ),
    ],
)
def test_owner_groups(world: World, options: dict[str, object], steered: set[int]) -> None:
    with world.steered(**options):
        for gid in (0, 7, 8):
            expected = Verdict.OUTBOUND if gid in steered else Verdict.DIRECT
            for destination in (world.stranger.ip, world.stranger.ip6):
                assert world.ask(destination, TCP, port=80, gid=gid).verdict == expected


def test_host_loopback_range(world: World) -> None:
    """The sidecar reaches what is local to the host itself; the rest of loopback is the pod's."""
    sidecar = {"uid": 1337, "gid": 1337}

    def verdict(destination: str) -> Verdict:
        return world.ask(destination, TCP, port=80, **sidecar).verdict

    with world.steered():
        assert verdict("127.0.0.1") == verdict("::1") == Verdict.DIRECT
        assert verdict("127.0.0.2") == Verdict.INBOUND
    with world.steered(host_loopback_range=IPv4Network("127.0.0.0/24")):
        assert verdict("127.0.0.2") == Verdict.DIRECT
        assert verdict("127.0.1.2") == Verdict.INBOUND


def reached(lab: LabPod, destinations: Iterable[str], port: int = 80) -> list[Verdict | str]:
    calls = [probes.Call(ip_address(destination), port) for destination in destinations]
    arrivals = lab.call(probes.dial, calls)
    for call, each in zip(calls, arrivals, strict=True):
        if isinstance(each, probes.Arrival):
            assert (each.destination, each.port) == (call.destination, port)
    return [each.verdict if isinstance(each, probes.Arrival) else each for each in arrivals]


def test_excluded_interfaces_are_direct_both_ways(world: World) -> None:
    near, far = second_link(world.pod, "eth1", world.stranger)
    dns = {"dns_capture": True, "dns_servers": None}
    with world.steered(exclude_interfaces=frozenset({"eth1"}), **dns):
        assert reached(world.pod, far) == [Verdict.DIRECT] * 2
        assert reached(world.stranger, near) == [Verdict.DIRECT] * 2
        for destination in far:
            assert world.verdicts(destination) == [Verdict.DIRECT] * 2
        through_eth0 = (world.stranger.ip, world.stranger.ip6)
        assert reached(world.pod, through_eth0) == [Verdict.OUTBOUND] * 2
        assert reached(world.resolver, (world.pod.ip, world.pod.ip6)) == [Verdict.INBOUND] * 2
        assert world.verdicts(world.stranger.ip) == [Verdict.DNS] * 2
    with world.steered():
        assert reached(world.pod, far) == [Verdict.OUTBOUND] * 2
        assert reached(world.stranger, near) == [Verdict.INBOUND] * 2


def test_virtual_machines_behind_an_interface_are_outbound(node: Node, world: World) -> None:
    """What they open to an included range goes to the sidecar, whatever the port; no inbound."""
    machine = node.pod("machine")
    near, _ = second_link(world.pod, "k6t-eth0", machine)
    services = ("10.96.0.1", "fd96::1")
    for service, via in zip(services, near, strict=True):
        machine.run(["ip", "route", "add", service, "via", via], check=True)
    included = (*map(ip_network, services), ip_network(world.pod.ip), ip_network(world.pod.ip6))
    machine.run(["ip", "route", "add", world.pod.ip, "via", near[0]], check=True)
    machine.run(["ip", "route", "add", world.pod.ip6, "via", near[1]], check=True)
    interfaces = frozenset({"k6t-eth0"})
    with world.steered(kubevirt_interfaces=interfaces, include_outbound_cidrs=included):
        for port in (80, 15008):
            assert reached(machine, services, port) == [Verdict.OUTBOUND] * 2
            assert reached(machine, (world.pod.ip, world.pod.ip6), port) == [Verdict.OUTBOUND] * 2
        assert reached(machine, near) == [Verdict.DIRECT] * 2
        assert reached(world.stranger, (world.pod.ip, world.pod.ip6)) == [Verdict.INBOUND] * 2
    with world.steered(kubevirt_interfaces=interfaces, include_outbound_cidrs=()):
        assert reached(machine, near) == [Verdict.DIRECT] * 2


def stray_syn_ack(pod: LabPod, caller: LabPod) -> set[int]:
    """Send the pod an answer that it never asked for; the ports that answer with a reset.

    A question to a closed port follows, which is always answered: then all answers are in.
    """
    syn, reset, ack = 0x02, 0x04, 0x10
    stray, closed = 80, 81

    def segment(port: int, flags: int) -> bytes:
        header = struct.pack("!HHIIBBHHH", 4444, port, 1, 1, 5 << 4, flags, 1024, 0, 0)
        pseudo = socket.inet_aton(caller.ip) + socket.inet_aton(pod.ip) + struct.pack("!HH", 6, 20)
        total = sum(struct.unpack("!16H", pseudo + header))
        total = (total >> 16) + (total & 0xFFFF)
        return header[:16] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + header[18:]

    def send() -> set[int]:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            raw.settimeout(probes.TIMEOUT)
            raw.sendto(segment(stray, syn | ack), (pod.ip, 0))
            raw.sendto(segment(closed, syn), (pod.ip, 0))
            met: set[int] = set()
            while closed not in met:
                answer = raw.recv(4096)[20:]
                port, _, _, _, _, flags = struct.unpack_from("!HHIIBB", answer)
                if flags & reset:
                    met.add(port)
            return met

    return caller.call(send)


def test_drop_invalid(world: World) -> None:
    ports = frozenset({8080})
    with world.steered(include_inbound_ports=ports):
        assert stray_syn_ack(world.pod, world.stranger) == {80, 81}
    with world.steered(include_inbound_ports=ports, drop_invalid=True):
        assert stray_syn_ack(world.pod, world.stranger) == {81}
        assert reached(world.stranger, (world.pod.ip, world.pod.ip6)) == [Verdict.DIRECT] * 2
    assert stray_syn_ack(world.pod, world.stranger) == {80, 81}
