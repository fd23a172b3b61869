"""What the kernel does with a connection is what `steering.decide` says, in each mode."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import probes
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from links import FAR, NEAR, second_link

from redirector.lab import LabPod, Node
from redirector.model import EVERYWHERE, IPAddress, IPNetwork, Mode, Pod, Steering
from redirector.modes.base import ModeDriver
from redirector.network import addresses, netns_cookie
from redirector.routes import links
from redirector.steering import (
    DNS_PORT,
    PASSTHROUGH_SOURCES,
    RULES,
    TUNNEL_PORT,
    Connection,
    Direction,
    Protocol,
    Verdict,
    decide,
)

pytestmark = pytest.mark.root

#: Where applications listen; all but the plain three are special to some sidecar or rule.
PORTS = (53, 80, 443, 8080, 15008, 15020, 15090)
#: Addresses beyond the node's subnet; the peer answers for all of them.
SERVICES = (IPv4Network("10.96.0.0/16"), IPv6Network("fd96::/64"))
SERVICE_IPS: tuple[IPAddress, ...] = (
    IPv4Address("10.96.0.1"),
    IPv4Address("10.96.7.7"),
    IPv6Address("fd96::1"),
    IPv6Address("::ffff:10.96.0.1"),
)
LOOPBACK_IPS: tuple[IPAddress, ...] = tuple(
    ip_address(text) for text in ("127.0.0.1", "127.0.0.2", "127.1.2.3", "0.0.0.0", "::1", "::")
)
RESOLVERS: tuple[IPAddress, ...] = (
    SERVICE_IPS[0],
    SERVICE_IPS[2],
    IPv4Address("127.0.0.2"),
    IPv6Address("::1"),
)
#: Beside eth0, over which the pod reaches everything else.
SECOND_LINK = "eth1"
NEAR_IPS, FAR_IPS = (tuple(map(ip_address, ends)) for ends in (NEAR, FAR))
LISTENERS = [(Verdict.OUTBOUND, 15001), (Verdict.INBOUND, 15006), (Verdict.DNS, 15053)]


@dataclass(frozen=True)
class Mesh:
    """The pod under test and another one."""

    pod: LabPod
    peer: LabPod

    @property
    def own(self) -> tuple[IPAddress, ...]:
        return addresses(self.pod.netns)

    def enrolled(self, mode: Mode, steering: Steering) -> Pod:
        """The pod under test as a mode's driver is given it."""
        return Pod(
            self.pod.name,
            self.pod.netns,
            self.pod.cgroup,
            mode,
            steering=steering,
            addresses=self.own,
            links=links(self.pod.name, self.pod.netns, steering.exclude_interfaces),
            netns_cookie=netns_cookie(self.pod.netns),
        )


def ips(pod: LabPod) -> tuple[IPAddress, ...]:
    return ip_address(pod.ip), ip_address(pod.ip6)


@dataclass(frozen=True)
class Caller:
    uid: int
    gid: int


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Node(prefix="rdrdecide") as node:
        made = Mesh(node.pod("pod"), node.pod("peer"))
        for net, via in zip(SERVICES, (made.peer.ip, made.peer.ip6), strict=True):
            made.peer.run(["ip", "route", "add", "local", str(net), "dev", "lo"], check=True)
            made.pod.run(["ip", "route", "add", str(net), "via", via], check=True)
        made.pod.run(["ip", "address", "add", "::6/128", "dev", "lo"], check=True)
        second_link(made.pod, SECOND_LINK, made.peer)
        probes.start(made.pod, LISTENERS, sidecar=True)
        for pod in (made.pod, made.peer):
            probes.start(pod, [(Verdict.DIRECT, port) for port in PORTS])
        yield made


def ports() -> st.SearchStrategy[frozenset[int]]:
    return st.frozensets(st.sampled_from(PORTS), max_size=2)


def cidrs() -> st.SearchStrategy[tuple[IPNetwork, ...]]:
    choice: tuple[IPNetwork, ...] = (
        *SERVICES,
        IPv4Network("10.96.7.0/24"),
        IPv4Network("10.0.0.0/8"),
        IPv4Network("127.0.0.0/8"),
        IPv4Network("127.1.0.0/16"),
        IPv4Network("127.0.0.1/32"),
        IPv4Network("10.78.0.0/24"),
        IPv6Network("fd00::/8"),
        IPv6Network("fd78::/64"),
        # Holds ::ffff:0:0/96, as which the kernel may know IPv4.
        IPv6Network("::/1"),
        IPv6Network("::1/128"),
    )
    return st.lists(st.sampled_from(choice), max_size=3, unique=True).map(tuple)


def groups() -> st.SearchStrategy[frozenset[int]]:
    return st.frozensets(st.sampled_from((0, 1338)), max_size=2)


def interfaces() -> st.SearchStrategy[frozenset[str]]:
    return st.sampled_from([frozenset()] * 3 + [frozenset({SECOND_LINK})])


def steerings() -> st.SearchStrategy[Steering]:
    return st.builds(
        Steering,
        proxy_uids=st.sampled_from([(1337,), (1337, 1338), (1338, 1337), ()]),
        proxy_gids=st.sampled_from([(1337,), (1337, 1338), ()]),
        include_outbound_cidrs=st.just(EVERYWHERE) | cidrs(),
        exclude_outbound_cidrs=st.just(())
        | st.sampled_from(SERVICES).map(lambda net: (net,))
        | cidrs(),
        include_outbound_ports=ports(),
        exclude_outbound_ports=st.just(frozenset()) | ports(),
        include_inbound_ports=st.none() | ports(),
        exclude_inbound_ports=st.just(Steering().exclude_inbound_ports) | ports(),
        exclude_interfaces=interfaces(),
        kubevirt_interfaces=interfaces(),
        include_owner_groups=st.none() | st.none() | groups(),
        exclude_owner_groups=st.just(frozenset()) | st.just(frozenset()) | groups(),
        dns_capture=st.booleans(),
        dns_servers=st.none()
        | st.lists(st.sampled_from(RESOLVERS), max_size=3, unique=True).map(tuple),
        host_loopback_range=st.sampled_from(
            [IPv4Network(text) for text in ("127.0.0.1/32", "127.0.0.0/24", "127.0.0.0/8")]
        ),
        drop_invalid=st.booleans(),
    )


def as_understood(mode: Mode, steering: Steering) -> Steering:
    """Without what a mode refuses at enrolment."""
    if mode is Mode.IPTABLES:
        return steering
    none: frozenset[str] = frozenset()
    return replace(
        steering,
        kubevirt_interfaces=none,
        drop_invalid=False,
    )


def callers() -> st.SearchStrategy[Caller]:
    return st.builds(
        Caller, uid=st.sampled_from([0, 1000, 1337, 1338]), gid=st.sampled_from([0, 0, 1337, 1338])
    )


@st.composite
def outbound_calls(draw: st.DrawFn, mesh: Mesh) -> probes.Call:
    own, peers = ips(mesh.pod), ips(mesh.peer)
    destination = draw(
        st.one_of(
            st.sampled_from(own),
            st.sampled_from(LOOPBACK_IPS),
            st.sampled_from((*SERVICE_IPS, *peers)),
            st.sampled_from((*NEAR_IPS, *FAR_IPS)),
        )
    )
    source = None
    if destination in own or destination in LOOPBACK_IPS:
        # Only what stays in the pod can be sent from a loopback address.
        same = [ip for ip in PASSTHROUGH_SOURCES if ip.version == destination.version]
        source = draw(st.sampled_from([None] * 6 + same))
    port, protocol = draw(ports_and_protocols())
    return probes.Call(destination, port, source, protocol)


def ports_and_protocols() -> st.SearchStrategy[tuple[int, Protocol]]:
    of_dns = st.tuples(st.just(DNS_PORT), st.sampled_from(Protocol))
    return st.tuples(st.sampled_from(PORTS), st.just(Protocol.TCP)) | of_dns


@st.composite
def inbound_calls(draw: st.DrawFn, mesh: Mesh) -> probes.Call:
    destination = draw(st.sampled_from((*ips(mesh.pod), *NEAR_IPS)))
    port, protocol = draw(ports_and_protocols())
    return probes.Call(destination, port, protocol=protocol)


def by_interface(destination: IPAddress) -> str:
    """Which of the pod's interfaces leads there, or is there."""
    return SECOND_LINK if destination in (*NEAR_IPS, *FAR_IPS) else "eth0"


#: Rules of options that eBPF mode refuses.
OF_IPTABLES_ALONE = {
    "inbound.kubevirt",
    "inbound.kubevirt-included",
}
#: With `calls_for_every_rule` and `reached_for_every_rule`, each rule is met at least once.
EVERY_RULE = Steering(
    include_outbound_cidrs=SERVICES[:1],
    exclude_outbound_cidrs=(IPv4Network("10.96.7.0/24"),),
    include_outbound_ports=frozenset({8080}),
    exclude_outbound_ports=frozenset({443}),
    include_owner_groups=frozenset({0, 1337, 1338}),
    exclude_owner_groups=frozenset({1338}),
    dns_capture=True,
    dns_servers=RESOLVERS,
    exclude_interfaces=frozenset({SECOND_LINK}),
)
#: Beside that one, because an excluded interface's virtual machines are direct.
KUBEVIRT = Steering(
    include_outbound_cidrs=(IPv4Network("10.78.0.0/24"),),
    kubevirt_interfaces=frozenset({SECOND_LINK}),
)


def calls_for_every_rule(mesh: Mesh) -> list[tuple[Caller, probes.Call]]:
    app, proxy, group = Caller(0, 0), Caller(1337, 1337), Caller(0, 1337)
    own, (peer, peer6) = ip_address(mesh.pod.ip), ips(mesh.peer)
    service, excluded = SERVICE_IPS[:2]
    return [
        (app, probes.Call(service, 443)),
        (proxy, probes.Call(own, 80, IPv4Address("127.0.0.6"))),
        (proxy, probes.Call(own, TUNNEL_PORT)),
        (proxy, probes.Call(own, 80)),
        (proxy, probes.Call(service, 80)),
        (group, probes.Call(service, 80)),
        (app, probes.Call(own, 80)),
        (app, probes.Call(excluded, 8080)),
        (app, probes.Call(peer6, 8080)),
        (app, probes.Call(service, 80)),
        (app, probes.Call(peer, 80)),
        (app, probes.Call(FAR_IPS[0], 80)),
        (Caller(0, 1338), probes.Call(service, 80)),
        (Caller(0, 1000), probes.Call(service, 80)),
        (app, probes.Call(service, DNS_PORT)),
        (app, probes.Call(service, DNS_PORT, protocol=Protocol.UDP)),
        (app, probes.Call(peer, DNS_PORT, protocol=Protocol.UDP)),
    ]


def reached_for_every_rule(mesh: Mesh) -> list[probes.Call]:
    own = ip_address(mesh.pod.ip)
    return [
        *(probes.Call(own, port) for port in (TUNNEL_PORT, 15020, 80)),
        probes.Call(own, DNS_PORT, protocol=Protocol.UDP),
        probes.Call(NEAR_IPS[0], 80),
    ]


def as_connection(
    direction: Direction, call: probes.Call, own: tuple[IPAddress, ...], uid: int = 0, gid: int = 0
) -> Connection:
    return Connection(
        direction,
        call.destination,
        call.port,
        own,
        call.source,
        uid,
        gid,
        call.protocol,
        by_interface(call.destination),
    )


def sender(mesh: Mesh, connection: Connection) -> IPAddress:
    """Whom the sidecar or the server must see: the source address that nobody changes."""
    version = connection.destination.version
    if connection.source is not None:
        return connection.source
    if connection.destination in (*NEAR_IPS, *FAR_IPS):
        inside = connection.direction is Direction.OUTBOUND
        return next(ip for ip in (NEAR_IPS if inside else FAR_IPS) if ip.version == version)
    if connection.direction is Direction.INBOUND:
        return next(ip for ip in ips(mesh.peer) if ip.version == version)
    if connection.destination.is_loopback:
        return ip_address("127.0.0.1" if version == 4 else "::1")
    return next(ip for ip in ips(mesh.pod) if ip.version == version)


def check(
    mesh: Mesh,
    steering: Steering,
    connection: Connection,
    outcome: probes.Arrival | str,
    mode: Mode,
) -> str:
    """Hold one outcome to the rules; return the rule's name."""
    expected = decide(steering, connection)
    story = f"{mode}: {connection} by {expected.rule} of {steering}: {outcome}"
    assert isinstance(outcome, probes.Arrival), story
    assert outcome.verdict == expected.verdict, story
    assert (outcome.destination, outcome.port) == (connection.destination, connection.port), story
    # Of a pod with several addresses eBPF mode shows the sidecar the first of a family.
    first = mode is Mode.EBPF and connection.destination in FAR_IPS
    if expected.verdict is Verdict.DIRECT or not first:
        assert outcome.client == sender(mesh, connection), story
    return expected.rule


def test_kernel_decides_as_the_rules_say(mesh: Mesh, driver: ModeDriver) -> None:
    own = mesh.own
    met: Counter[str] = Counter()
    outbound = st.tuples(callers(), outbound_calls(mesh))

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
    )
    @given(
        steerings(),
        st.lists(outbound, min_size=12, max_size=20),
        st.lists(inbound_calls(mesh), min_size=4, max_size=6),
    )
    @example(EVERY_RULE, calls_for_every_rule(mesh), reached_for_every_rule(mesh))
    @example(KUBEVIRT, [], [probes.Call(near, TUNNEL_PORT) for near in NEAR_IPS])
    @example(Steering(include_inbound_ports=frozenset({80})), [], [probes.Call(own[0], 443)])
    def hold(
        steering: Steering, out: list[tuple[Caller, probes.Call]], into: list[probes.Call]
    ) -> None:
        steering = as_understood(driver.mode, steering)
        pod = mesh.enrolled(driver.mode, steering)
        driver.install(pod)
        try:
            compare(steering, out, into)
        finally:
            driver.remove(pod)

    def compare(
        steering: Steering, out: list[tuple[Caller, probes.Call]], into: list[probes.Call]
    ) -> None:
        def key(item: tuple[Caller, probes.Call]) -> tuple[int, int]:
            return item[0].uid, item[0].gid

        for (uid, gid), group in itertools.groupby(sorted(out, key=key), key=key):
            calls = [call for _, call in group]
            outcomes = mesh.pod.call(probes.dial, calls, uid=uid, gid=gid)
            for call, outcome in zip(calls, outcomes, strict=True):
                connection = as_connection(Direction.OUTBOUND, call, own, uid, gid)
                met[check(mesh, steering, connection, outcome, driver.mode)] += 1
        for call, outcome in zip(into, mesh.peer.call(probes.dial, into), strict=True):
            connection = as_connection(Direction.INBOUND, call, own)
            met[check(mesh, steering, connection, outcome, driver.mode)] += 1

    hold()
    rules = {rule.name for rule in RULES}
    if driver.mode is Mode.EBPF:
        rules -= OF_IPTABLES_ALONE
    assert met.keys() == rules, f"the calls never met {rules - met.keys()}"


def test_everything_is_direct_after_removal(mesh: Mesh, driver: ModeDriver) -> None:
    pod = mesh.enrolled(driver.mode, Steering())
    call = probes.Call(SERVICE_IPS[0], 80)
    driver.install(pod)
    try:
        assert mesh.pod.call(probes.dial, [call])[0].verdict == Verdict.OUTBOUND
    finally:
        driver.remove(pod)
    assert mesh.pod.call(probes.dial, [call])[0].verdict == Verdict.DIRECT
    own = probes.Call(ip_address(mesh.pod.ip), 80)
    assert mesh.peer.call(probes.dial, [own])[0].verdict == Verdict.DIRECT
