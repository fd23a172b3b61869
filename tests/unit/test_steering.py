"""Which connection goes where."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from redirector.model import IPAddress
from redirector.options import parse
from redirector.steering import Connection, Decision, Direction, Protocol, Verdict, decide

OWN: tuple[IPAddress, ...] = (IPv4Address("10.77.0.10"), IPv6Address("fd77::a"))
DIRECT, OUTBOUND, INBOUND, DNS = Verdict
APP, PROXY = 1000, 1337


def outbound(
    options: dict[str, str],
    destination: str,
    port: int = 80,
    *,
    uid: int = APP,
    gid: int = 1000,
    source: str | None = None,
    protocol: Protocol = Protocol.TCP,
    interface: str = "eth0",
) -> Decision:
    connection = Connection(
        Direction.OUTBOUND,
        ip_address(destination),
        port,
        OWN,
        ip_address(source) if source else None,
        uid,
        gid,
        protocol,
        interface,
    )
    return decide(parse(options), connection)


@pytest.mark.parametrize(
    ("options", "destination", "port", "uid", "verdict", "rule"),
    [
        # By default everything that leaves the pod goes to the sidecar.
        ({}, "10.96.0.1", 80, APP, OUTBOUND, "included-cidr"),
        ({}, "fd96::1", 80, APP, OUTBOUND, "included-cidr"),
        ({}, "::ffff:10.96.0.1", 80, APP, OUTBOUND, "included-cidr"),
        ({}, "10.96.0.1", 15008, APP, OUTBOUND, "included-cidr"),
        # What stays in the pod does not.
        ({}, "10.77.0.10", 80, APP, DIRECT, "app-local"),
        ({}, "::ffff:10.77.0.10", 80, APP, DIRECT, "app-local"),
        ({}, "fd77::a", 80, APP, DIRECT, "app-local"),
        ({}, "127.0.0.1", 80, APP, DIRECT, "app-local"),
        ({}, "127.0.0.2", 80, APP, DIRECT, "app-local"),
        ({}, "::1", 80, APP, DIRECT, "app-local"),
        ({}, "0.0.0.0", 80, APP, DIRECT, "app-local"),
        ({}, "::", 80, APP, DIRECT, "app-local"),
        ({}, "::6", 80, APP, DIRECT, "app-local"),
        # A range inside loopback is honoured, but localhost stays localhost.
        (
            {"includeOutboundIPRanges": "127.0.0.0/8"},
            "127.0.0.2", 80, APP, OUTBOUND, "included-cidr",
        ),
        ({"includeOutboundIPRanges": "127.0.0.0/8"}, "127.0.0.1", 80, APP, DIRECT, "app-local"),
        ({"includeOutboundIPRanges": "127.9.9.9"}, "127.0.0.2", 80, APP, DIRECT, "app-local"),
        ({"includeOutboundIPRanges": "::1"}, "::1", 80, APP, DIRECT, "app-local"),
        # The proxy's own.
        ({}, "10.96.0.1", 80, PROXY, DIRECT, "proxy-uid"),
        ({}, "127.0.0.1", 80, PROXY, DIRECT, "proxy-uid"),
        ({}, "::1", 80, PROXY, DIRECT, "proxy-uid"),
        ({}, "10.77.0.10", 80, PROXY, INBOUND, "proxy-self"),
        ({}, "fd77::a", 80, PROXY, INBOUND, "proxy-self"),
        ({}, "127.0.0.2", 80, PROXY, INBOUND, "proxy-self"),
        ({}, "10.77.0.10", 15008, PROXY, DIRECT, "proxy-tunnel"),
        ({"includeInboundPorts": ""}, "10.77.0.10", 80, PROXY, INBOUND, "proxy-self"),
        ({"proxyUID": "1337,1338"}, "10.77.0.10", 80, 1338, DIRECT, "proxy-uid"),
        ({"proxyUID": ""}, "10.96.0.1", 80, PROXY, OUTBOUND, "included-cidr"),
        # Exclude beats include.
        ({"excludeOutboundPorts": "80"}, "10.96.0.1", 80, APP, DIRECT, "excluded-port"),
        ({"excludeOutboundPorts": "80"}, "10.77.0.10", 80, PROXY, DIRECT, "excluded-port"),
        (
            {"excludeOutboundPorts": "80", "includeOutboundPorts": "80"},
            "10.96.0.1", 80, APP, DIRECT, "excluded-port",
        ),
        (
            {"excludeOutboundIPRanges": "10.96.0.0/16", "includeOutboundPorts": "80"},
            "10.96.0.1", 80, APP, DIRECT, "excluded-cidr",
        ),
        # A port counts outside the ranges, too.
        (
            {"includeOutboundIPRanges": "10.1.0.0/16", "includeOutboundPorts": "80"},
            "10.96.0.1", 80, APP, OUTBOUND, "included-port",
        ),
        ({"includeOutboundIPRanges": "10.1.0.0/16"}, "10.96.0.1", 80, APP, DIRECT, "not-included"),
        ({"includeOutboundIPRanges": "10.0.0.0/8"}, "fd96::1", 80, APP, DIRECT, "not-included"),
        ({"includeOutboundIPRanges": ""}, "10.96.0.1", 80, APP, DIRECT, "not-included"),
    ],
)  # fmt: skip
def test_outbound(
    options: dict[str, str], destination: str, port: int, uid: int, verdict: Verdict, rule: str
) -> None:
    assert outbound(options, destination, port, uid=uid) == Decision(verdict, f"outbound.{rule}")


def test_proxy_by_group_alone_is_direct_to_itself_too() -> None:
    expected = Decision(DIRECT, "outbound.proxy-gid")
    assert outbound({}, "10.96.0.1", gid=1337) == expected
    assert outbound({}, "10.77.0.10", gid=1337) == expected
    assert outbound({"proxyGID": ""}, "10.96.0.1", gid=1337).verdict == OUTBOUND


@pytest.mark.parametrize(("source", "own"), [("127.0.0.6", "10.77.0.10"), ("::6", "fd77::a")])
def test_passthrough_is_direct_only_within_the_pod(source: str, own: str) -> None:
    assert outbound({}, own, uid=PROXY, source=source).rule == "outbound.passthrough"
    away = "10.96.0.1" if "." in own else "fd96::1"
    assert outbound({}, away, source=source).verdict == OUTBOUND


def test_unspecified_destination_is_the_bound_address() -> None:
    assert outbound({}, "0.0.0.0", uid=PROXY, source="10.77.0.10").verdict == INBOUND
    assert outbound({}, "0.0.0.0", uid=PROXY, source="0.0.0.0").verdict == DIRECT
    assert outbound({}, "::", uid=PROXY, source="::ffff:10.77.0.10").verdict == DIRECT
    assert outbound({}, "::ffff:0.0.0.0", uid=PROXY, source="::ffff:10.77.0.10").verdict == INBOUND


@pytest.mark.parametrize(
    ("options", "port", "verdict", "rule"),
    [
        ({}, 80, INBOUND, "included-port"),
        ({}, 15006, INBOUND, "included-port"),
        ({}, 15008, DIRECT, "tunnel-port"),
        ({}, 15020, DIRECT, "excluded-port"),
        ({}, 15021, DIRECT, "excluded-port"),
        ({}, 15090, DIRECT, "excluded-port"),
        ({"excludeInboundPorts": "80"}, 80, DIRECT, "excluded-port"),
        ({"excludeInboundPorts": "80"}, 15090, INBOUND, "included-port"),
        # A list says it all: exclusions count only with *.
        ({"includeInboundPorts": "80,15090"}, 15090, INBOUND, "included-port"),
        ({"includeInboundPorts": "80", "excludeInboundPorts": "80"}, 80, INBOUND,
         "included-port"),
        ({"includeInboundPorts": "80"}, 81, DIRECT, "not-included"),
        ({"includeInboundPorts": "15008"}, 15008, DIRECT, "tunnel-port"),
        ({"includeInboundPorts": ""}, 80, DIRECT, "not-included"),
    ],
)  # fmt: skip
def test_inbound(options: dict[str, str], port: int, verdict: Verdict, rule: str) -> None:
    connection = Connection(Direction.INBOUND, OWN[0], port, OWN)
    assert decide(parse(options), connection) == Decision(verdict, f"inbound.{rule}")


def test_the_host_loopback_range_is_direct() -> None:
    options = {"hostLoopbackRange": "127.0.0.0/24", "includeOutboundIPRanges": "127.0.0.0/8"}
    assert outbound(options, "127.0.0.9") == Decision(DIRECT, "outbound.app-local")
    assert outbound(options, "127.0.0.9", uid=PROXY) == Decision(DIRECT, "outbound.proxy-uid")
    assert outbound(options, "127.0.1.9") == Decision(OUTBOUND, "outbound.included-cidr")
    assert outbound(options, "127.0.1.9", uid=PROXY) == Decision(INBOUND, "outbound.proxy-self")


@pytest.mark.parametrize(
    ("options", "gid", "verdict", "rule"),
    [
        ({"excludeOwnerGroups": "5,6"}, 6, DIRECT, "excluded-group"),
        ({"excludeOwnerGroups": "5,6"}, 7, OUTBOUND, "included-cidr"),
        ({"includeOwnerGroups": "5,6"}, 6, OUTBOUND, "included-cidr"),
        ({"includeOwnerGroups": "5,6"}, 7, DIRECT, "group-not-included"),
        ({"includeOwnerGroups": ""}, 7, DIRECT, "group-not-included"),
        ({"includeOwnerGroups": "*"}, 7, OUTBOUND, "included-cidr"),
        ({"includeOwnerGroups": "5", "excludeOwnerGroups": "5"}, 5, DIRECT, "excluded-group"),
        ({"includeOwnerGroups": "1337"}, 1337, DIRECT, "proxy-gid"),
        ({"includeOwnerGroups": "5", "excludeOutboundPorts": "80"}, 7, DIRECT, "excluded-port"),
    ],
)
def test_owner_groups(options: dict[str, str], gid: int, verdict: Verdict, rule: str) -> None:
    assert outbound(options, "10.96.0.1", gid=gid) == Decision(verdict, f"outbound.{rule}")


CAPTURE = {"dnsCapture": "true", "dnsServers": "10.96.0.10,fd96::a,127.0.0.53"}


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize(
    ("options", "destination", "port", "uid", "verdict", "rule"),
    [
        (CAPTURE, "10.96.0.10", 53, APP, DNS, "dns"),
        (CAPTURE, "fd96::a", 53, APP, DNS, "dns"),
        (CAPTURE, "::ffff:10.96.0.10", 53, APP, DNS, "dns"),
        (CAPTURE, "127.0.0.53", 53, APP, DNS, "dns"),
        (CAPTURE | {"dnsServers": "*"}, "10.1.1.1", 53, APP, DNS, "dns"),
        (CAPTURE | {"excludeOutboundIPRanges": "10.96.0.10"}, "10.96.0.10", 53, APP, DNS, "dns"),
        (CAPTURE, "10.96.0.10", 53, PROXY, DIRECT, "proxy-uid"),
        (CAPTURE, "10.77.0.10", 53, PROXY, DIRECT, "proxy-uid"),
        (CAPTURE | {"excludeOutboundPorts": "53"}, "10.96.0.10", 53, APP, DIRECT, "excluded-port"),
        (CAPTURE | {"excludeOwnerGroups": "1000"}, "10.96.0.10", 53, APP, DIRECT,
         "excluded-group"),
        (CAPTURE | {"excludeInterfaces": "eth0"}, "10.96.0.10", 53, APP, DIRECT,
         "excluded-interface"),
    ],
)  # fmt: skip
def test_dns_capture(
    protocol: Protocol,
    options: dict[str, str],
    destination: str,
    port: int,
    uid: int,
    verdict: Verdict,
    rule: str,
) -> None:
    expected = Decision(verdict, f"outbound.{rule}")
    assert outbound(options, destination, port, uid=uid, protocol=protocol) == expected


@pytest.mark.parametrize(
    ("options", "destination", "port"),
    [
        (CAPTURE, "10.96.0.10", 5353),
        (CAPTURE, "10.96.0.11", 53),
        ({"dnsCapture": "true"}, "10.96.0.10", 53),
        ({"dnsServers": "*"}, "10.96.0.10", 53),
        ({"includeOutboundPorts": "53"}, "10.96.0.10", 53),
    ],
)
def test_other_udp_never_moves(options: dict[str, str], destination: str, port: int) -> None:
    expected = Decision(DIRECT, "outbound.not-tcp")
    assert outbound(options, destination, port, protocol=Protocol.UDP) == expected
    assert outbound(options, destination, port).rule in (
        "outbound.included-cidr", "outbound.included-port"
    )  # fmt: skip


def test_excluded_interfaces_count_both_ways() -> None:
    options = {"excludeInterfaces": "eth1"}
    expected = Decision(DIRECT, "outbound.excluded-interface")
    assert outbound(options, "10.96.0.1", interface="eth1") == expected
    assert outbound(options, "10.96.0.1").verdict == OUTBOUND
    # What stays in the pod goes over lo, whatever the route to its address says.
    assert outbound(options, "10.77.0.10", interface="eth1").rule == "outbound.app-local"
    assert outbound({"excludeInterfaces": "lo"}, "127.0.0.1") == expected
    inbound = Connection(Direction.INBOUND, OWN[0], 80, OWN, interface="eth1")
    assert decide(parse(options), inbound) == Decision(DIRECT, "inbound.excluded-interface")


@pytest.mark.parametrize(
    ("destination", "port", "verdict", "rule"),
    [
        ("10.96.0.1", 80, OUTBOUND, "kubevirt-included"),
        ("10.77.0.10", 15008, OUTBOUND, "kubevirt-included"),
        ("192.0.2.1", 80, DIRECT, "kubevirt"),
    ],
)
def test_virtual_machines_open_outbound_connections(
    destination: str, port: int, verdict: Verdict, rule: str
) -> None:
    options = {"kubevirtInterfaces": "k6t-eth0", "includeOutboundIPRanges": "10.0.0.0/8"}
    connection = Connection(
        Direction.INBOUND, ip_address(destination), port, OWN, interface="k6t-eth0"
    )
    assert decide(parse(options), connection) == Decision(verdict, f"inbound.{rule}")


def test_udp_from_outside_is_direct() -> None:
    connection = Connection(Direction.INBOUND, OWN[0], 80, OWN, protocol=Protocol.UDP)
    assert decide(parse({}), connection) == Decision(DIRECT, "inbound.not-tcp")
