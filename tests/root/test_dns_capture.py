"""DNS of the resolvers goes to the sidecar, in both modes; who asked notices nothing."""

import re
import select
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import probes
import pytest
from xtables import as_pod

from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import IPAddress, Mode, Steering
from redirector.modes.base import ModeDriver
from redirector.resolvers import with_resolvers
from redirector.steering import Protocol, Verdict

pytestmark = pytest.mark.root

DNS, DIRECT, OUTBOUND = Verdict.DNS, Verdict.DIRECT, Verdict.OUTBOUND
RESOLVER_HERE = "127.0.0.53"
NAME = "web.shop.test"
#: What each responder says NAME's address is.
OF_SIDECAR, OF_RESOLVER = "192.0.2.7", "198.51.100.7"
OF_SIDECAR6 = "2001:db8::7"


@dataclass(frozen=True)
class World:
    pod: LabPod
    resolver: LabPod
    stranger: LabPod

    @property
    def resolvers(self) -> tuple[IPAddress, ...]:
        told = (self.resolver.ip, self.resolver.ip6, RESOLVER_HERE)
        return tuple(ip_address(address) for address in told)

    @property
    def capture(self) -> Steering:
        return Steering(dns_capture=True, dns_servers=self.resolvers)


@pytest.fixture
def world(node: Node) -> World:
    return World(node.pod("pod"), node.pod("resolver"), node.pod("stranger"))


@pytest.fixture
def probed(world: World) -> World:
    listeners = [(OUTBOUND, 15001), (Verdict.INBOUND, 15006), (DNS, 15053)]
    probes.start(world.pod, listeners, sidecar=True)
    for each in (world.pod, world.resolver, world.stranger):
        probes.start(each, [(DIRECT, port) for port in (53, 80)])
    return world


@contextmanager
def steered(world: World, driver: ModeDriver, steering: Steering) -> Iterator[None]:
    pod = replace(as_pod(world.pod, steering), mode=driver.mode)
    driver.install(pod)
    try:
        assert driver.missing(pod) == []
        yield
    finally:
        driver.remove(pod)


def ask(
    world: World, destination: str, *, port: int = 53, uid: int = 0, gid: int = 0
) -> dict[Protocol, probes.Arrival]:
    """Ask by TCP and by UDP; the answer always seems to come from whom was asked."""
    call = probes.Call(ip_address(destination), port)
    calls = [replace(call, protocol=protocol) for protocol in Protocol]
    arrivals = world.pod.call(probes.dial, calls, uid=uid, gid=gid)
    for each in arrivals:
        assert isinstance(each, probes.Arrival), (destination, arrivals)
        destinations = (unmapped(each.destination), each.port)
        assert destinations == (unmapped(call.destination), port), (destination, arrivals)
    return dict(zip(Protocol, arrivals, strict=True))


def unmapped(address: IPAddress) -> IPAddress:
    return getattr(address, "ipv4_mapped", None) or address


def verdicts(world: World, destination: str, **how: int) -> list[Verdict]:
    return [arrival.verdict for arrival in ask(world, destination, **how).values()]


def test_questions_to_the_resolvers_go_to_the_sidecar(probed: World, driver: ModeDriver) -> None:
    world = probed
    mapped = f"::ffff:{world.resolver.ip}"
    with steered(world, driver, world.capture):
        for resolver in (world.resolver.ip, world.resolver.ip6, mapped, RESOLVER_HERE):
            assert verdicts(world, resolver) == [DNS, DNS]
            assert verdicts(world, resolver, uid=1337) == [DIRECT, DIRECT]
            assert verdicts(world, resolver, gid=1337) == [DIRECT, DIRECT]
        for other in (world.stranger.ip, world.stranger.ip6):
            assert verdicts(world, other) == [OUTBOUND, DIRECT]
        assert verdicts(world, world.resolver.ip, port=80) == [OUTBOUND, DIRECT]
    assert verdicts(world, world.resolver.ip) == [DIRECT, DIRECT]


def test_the_sidecar_sees_who_asks(probed: World, driver: ModeDriver) -> None:
    world = probed
    expected = {
        world.resolver.ip: world.pod.ip,
        world.resolver.ip6: world.pod.ip6,
        f"::ffff:{world.resolver.ip}": world.pod.ip,
        RESOLVER_HERE: "127.0.0.1",
    }
    with steered(world, driver, world.capture):
        for resolver, client in expected.items():
            for arrival in ask(world, resolver).values():
                assert arrival.client == ip_address(client), (resolver, arrival)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dns_servers": None}, [DNS, DNS]),
        ({"dns_servers": ()}, [OUTBOUND, DIRECT]),
        ({"dns_capture": False}, [OUTBOUND, DIRECT]),
        ({"exclude_outbound_ports": frozenset({53})}, [DIRECT, DIRECT]),
        ({"exclude_owner_groups": frozenset({0})}, [DIRECT, DIRECT]),
        ({"include_owner_groups": frozenset({7})}, [DIRECT, DIRECT]),
    ],
)
def test_what_turns_capture_off(
    probed: World, driver: ModeDriver, options: dict[str, Any], expected: list[Verdict]
) -> None:
    with steered(probed, driver, replace(probed.capture, **options)):
        for resolver in (probed.resolver.ip, probed.resolver.ip6):
            assert verdicts(probed, resolver) == expected


def test_anybodys(probed: World, driver: ModeDriver) -> None:
    with steered(probed, driver, Steering(dns_capture=True, dns_servers=None)):
        for other in (probed.stranger.ip, probed.stranger.ip6, "127.0.0.1", "::1", probed.pod.ip):
            assert verdicts(probed, other) == [DNS, DNS]


def connected(destination: str) -> tuple[list[Any], list[Any], probes.Arrival]:
    """Ask by a connected UDP socket; its peer, its own address, and who answered."""
    v6 = ":" in destination
    with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(probes.TIMEOUT)
        one.connect((destination, 53))
        arrival = probes.answer_of(one, lambda: one.send(b"?"))
        return list(one.getpeername()[:2]), list(one.getsockname()[:2]), arrival


def test_connected_sockets_see_the_resolver(probed: World, driver: ModeDriver) -> None:
    world = probed
    with steered(world, driver, world.capture):
        for resolver, own in (
            (world.resolver.ip, world.pod.ip),
            (world.resolver.ip6, world.pod.ip6),
            (f"::ffff:{world.resolver.ip}", f"::ffff:{world.pod.ip}"),
        ):
            peer, name, arrival = world.pod.call(connected, resolver)
            assert arrival.verdict == DNS
            assert (arrival.destination, arrival.port) == (unmapped(ip_address(resolver)), 53)
            assert peer == [resolver, 53]
            assert name[0] == own
            assert arrival.client == unmapped(ip_address(own))


def one_after_the_other(resolver: str, stranger: str) -> list[tuple[Verdict, str]]:
    """A socket asks by sendto(), another is connected again and again."""
    found: list[probes.Arrival] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for address in (resolver, stranger, resolver):
            found.append(probes.ask(one, ip_address(address), 53))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(probes.TIMEOUT)
        for address in (resolver, stranger, resolver):
            one.connect((address, 53))
            found.append(probes.answer_of(one, lambda: one.send(b"?")))
    return [(each.verdict, str(each.destination)) for each in found]


def test_one_socket_may_ask_many(probed: World, driver: ModeDriver) -> None:
    resolver, stranger = probed.resolver.ip, probed.stranger.ip
    once = [(DNS, resolver), (DIRECT, stranger), (DNS, resolver)]
    with steered(probed, driver, probed.capture):
        assert probed.pod.call(one_after_the_other, resolver, stranger) == once * 2


def from_port(port: int, resolver: str) -> Verdict:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("0.0.0.0", port))
        return probes.ask(one, ip_address(resolver), 53).verdict


def test_the_sidecars_own_question_from_an_applications_port(
    probed: World, driver: ModeDriver
) -> None:
    with steered(probed, driver, probed.capture):
        for uid, verdict in ((0, DNS), (1337, DIRECT)) * 2:
            found = probed.pod.call(from_port, 5353, probed.resolver.ip, uid=uid, gid=uid)
            assert found == verdict


@dataclass(frozen=True)
class Responder:
    """A real name server; what it logs names who asked."""

    process: "subprocess.Popen[Any]"

    def askers(self, count: int) -> set[str]:
        """Whom the next `count` questions came from."""
        assert self.process.stdout is not None
        found: list[str] = []
        while len(found) < count:
            ready, _, _ = select.select([self.process.stdout], [], [], probes.TIMEOUT)
            assert ready, f"only {found} asked"
            line = self.process.stdout.readline()
            found += re.findall(rf"query\[A+\] {NAME} from (\S+)", line.decode())
        return set(found)


def respond(
    pod: LabPod, port: int, addresses: tuple[str, ...], listen: str, *, sidecar: bool = False
) -> Responder:
    program = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin")
    assert program, "dnsmasq is not installed: apt-get install dnsmasq-base"
    argv = [
        program, "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
        "--pid-file=", "--user=root", "--log-queries", "--log-facility=-", "--bind-interfaces",
        f"--port={port}", f"--listen-address={listen}",
        *(f"--address=/{NAME}/{address}" for address in addresses),
    ]  # fmt: skip
    process = pod.popen(
        argv, sidecar=sidecar, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    assert process.stdout is not None
    for line in process.stdout:
        if b"started" in line:
            return Responder(process)
    raise AssertionError(f"dnsmasq ended with {process.wait()}")


@pytest.fixture(params=["on loopback", "everywhere"])
def answered(world: World, request: pytest.FixtureRequest) -> tuple[World, Responder]:
    """A sidecar that answers DNS on loopback alone or everywhere; the resolver says otherwise."""
    listen = "127.0.0.1,::1"
    if request.param == "everywhere":
        listen += f",{world.pod.ip},{world.pod.ip6}"
    answers = (OF_SIDECAR, OF_SIDECAR6)
    sidecar = respond(world.pod, 15053, answers, listen, sidecar=True)
    respond(world.resolver, 53, (OF_RESOLVER,), f"{world.resolver.ip},{world.resolver.ip6}")
    return world, sidecar


def dig(world: World, server: str, *words: str, uid: int = 0) -> str:
    argv = ["dig", "+short", "+tries=1", "+time=5", f"@{server}", NAME, *words]
    done = world.pod.run(argv, uid=uid, gid=uid)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout).strip()


def test_dig(
    answered: tuple[World, Responder], driver: ModeDriver, request: pytest.FixtureRequest
) -> None:
    world, sidecar = answered
    with steered(world, driver, world.capture):
        for server, own in ((world.resolver.ip, world.pod.ip), (world.resolver.ip6, world.pod.ip6)):
            for transport in ("+notcp", "+tcp"):
                assert dig(world, server, transport) == OF_SIDECAR
                assert dig(world, server, transport, "AAAA") == OF_SIDECAR6
                asked = sidecar.askers(2)
                # dig binds a port, but no address, before it connects: then eBPF cannot set the
                # source of what it sends to loopback.
                if driver.mode is Mode.IPTABLES or "everywhere" in request.node.name:
                    assert asked == {own}
                assert dig(world, server, transport, uid=1337) == OF_RESOLVER
        assert dig(world, RESOLVER_HERE) == OF_SIDECAR
        assert sidecar.askers(1) == {"127.0.0.1"}
    assert dig(world, world.resolver.ip) == OF_RESOLVER


def getent(world: World, resolv_conf: Path) -> Callable[[str], list[str]]:
    """glibc's resolver with a resolv.conf of its own: A and AAAA by one connected socket."""

    def look_up(database: str) -> list[str]:
        script = f"mount --bind {resolv_conf} /etc/resolv.conf && getent {database} {NAME}"
        done = world.pod.run(["unshare", "--mount", "sh", "-c", script])
        return sorted({line.split()[0] for line in done.stdout.splitlines()})

    return look_up


def test_glibc(answered: tuple[World, Responder], driver: ModeDriver, tmp_path: Path) -> None:
    world, sidecar = answered
    resolver, here = world.resolver.ip, "127.0.0.1"
    resolv_conf = tmp_path / "resolv.conf"
    for servers, options, own in (
        ((resolver,), "", world.pod.ip),
        ((world.resolver.ip6,), "", world.pod.ip6),
        ((RESOLVER_HERE,), "", here),
        ((world.stranger.ip, resolver), "options timeout:1\n", world.pod.ip),
        ((resolver,), "options use-vc\n", world.pod.ip),
        ((resolver,), "options single-request-reopen\n", world.pod.ip),
    ):
        resolv_conf.write_text("".join(f"nameserver {ip}\n" for ip in servers) + options)
        look_up = getent(world, resolv_conf)
        with steered(world, driver, world.capture):
            assert look_up("ahosts") == sorted([OF_SIDECAR, OF_SIDECAR6]), servers
            assert sidecar.askers(2) == {own}, (servers, options)


def ask_all(resolvers: list[str]) -> list[tuple[str, int]]:
    """As musl does: one unconnected socket asks all at once, and takes answers of any of them."""
    query = b"\x12\x34\x01\x00\0\1\0\0\0\0\0\0" + b"".join(
        bytes([len(label)]) + label.encode() for label in NAME.split(".")
    ) + b"\0\0\1\0\1"  # fmt: skip
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(probes.TIMEOUT)
        for resolver in resolvers:
            one.sendto(query, (resolver, 53))
        answers = [one.recvfrom(512) for _ in resolvers]
    assert all(socket.inet_aton(OF_SIDECAR) in answer for answer, _ in answers)
    return [sender for _, sender in answers]


def test_musl(answered: tuple[World, Responder], driver: ModeDriver) -> None:
    world, _ = answered
    both = [world.resolver.ip, world.stranger.ip]
    steering = Steering(dns_capture=True, dns_servers=tuple(map(ip_address, both)))
    with steered(world, driver, steering):
        for sender in world.pod.call(ask_all, both):
            assert sender in [(ip, 53) for ip in both]


@pytest.mark.parametrize("mode", Mode)
def test_capture_is_turned_on_and_off_under_use(
    answered: tuple[World, Responder], enrollment: Enrollment, mode: Mode, tmp_path: Path
) -> None:
    world, _ = answered
    where = (world.pod.netns, world.pod.cgroup)
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {world.resolver.ip}\n")
    enrollment.enroll("pod", *where, mode)
    other = next(each for each in Mode if each is not mode)
    # A process of the pod that sees a resolv.conf of its own.
    script = f"mount --bind {resolv_conf} /etc/resolv.conf && echo ready && exec sleep 60"
    process = world.pod.popen(
        ["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        steering = with_resolvers("pod", Steering(dns_capture=True), where[0], world.pod.app)
        assert steering.dns_servers == (ip_address(world.resolver.ip),)
        enrollment.update("pod", steering=steering)
        assert dig(world, world.resolver.ip) == OF_SIDECAR
        enrollment.change_mode("pod", other)
        assert dig(world, world.resolver.ip) == OF_SIDECAR
        enrollment.change_mode("pod", mode)
        assert dig(world, world.resolver.ip) == OF_SIDECAR
        assert enrollment.status()[0].missing == ()
        enrollment.update("pod", steering=Steering())
        assert dig(world, world.resolver.ip) == OF_RESOLVER
        assert enrollment.status()[0].missing == ()
