"""Which connection goes where, and how a user's options are read."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from redirector.errors import InputError
from redirector.model import EVERYWHERE, IPAddress, Steering
from redirector.steering import (
    OPTIONS,
    Connection,
    Decision,
    Direction,
    Verdict,
    decide,
    parse,
)

OWN: tuple[IPAddress, ...] = (IPv4Address("10.77.0.10"), IPv6Address("fd77::a"))
DIRECT, OUTBOUND, INBOUND = Verdict.DIRECT, Verdict.OUTBOUND, Verdict.INBOUND
APP, PROXY = 1000, 1337


def outbound(
    options: dict[str, str],
    destination: str,
    port: int = 80,
    *,
    uid: int = APP,
    gid: int = 1000,
    source: str | None = None,
) -> Decision:
    bound = ip_address(source) if source else None
    connection = Connection(Direction.OUTBOUND, ip_address(destination), port, OWN, bound, uid, gid)
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
        # A range inside loopback is honoured, but localhost stays localhost.
        (
            {"include-outbound-cidrs": "127.0.0.0/8"},
            "127.0.0.2", 80, APP, OUTBOUND, "included-cidr",
        ),
        ({"include-outbound-cidrs": "127.0.0.0/8"}, "127.0.0.1", 80, APP, DIRECT, "app-local"),
        ({"include-outbound-cidrs": "127.9.9.9"}, "127.0.0.2", 80, APP, DIRECT, "app-local"),
        ({"include-outbound-cidrs": "::1"}, "::1", 80, APP, DIRECT, "app-local"),
        # The proxy's own.
        ({}, "10.96.0.1", 80, PROXY, DIRECT, "proxy-uid"),
        ({}, "127.0.0.1", 80, PROXY, DIRECT, "proxy-uid"),
        ({}, "::1", 80, PROXY, DIRECT, "proxy-uid"),
        ({}, "10.77.0.10", 80, PROXY, INBOUND, "proxy-self"),
        ({}, "fd77::a", 80, PROXY, INBOUND, "proxy-self"),
        ({}, "127.0.0.2", 80, PROXY, INBOUND, "proxy-self"),
        ({}, "10.77.0.10", 15008, PROXY, DIRECT, "proxy-tunnel"),
        ({"include-inbound-ports": ""}, "10.77.0.10", 80, PROXY, INBOUND, "proxy-self"),
        ({"proxy-uids": "1337,1338"}, "10.77.0.10", 80, 1338, DIRECT, "proxy-uid"),
        ({"proxy-uids": ""}, "10.96.0.1", 80, PROXY, OUTBOUND, "included-cidr"),
        # Exclude beats include.
        ({"exclude-outbound-ports": "80"}, "10.96.0.1", 80, APP, DIRECT, "excluded-port"),
        ({"exclude-outbound-ports": "80"}, "10.77.0.10", 80, PROXY, DIRECT, "excluded-port"),
        (
            {"exclude-outbound-ports": "80", "include-outbound-ports": "80"},
            "10.96.0.1", 80, APP, DIRECT, "excluded-port",
        ),
        (
            {"exclude-outbound-cidrs": "10.96.0.0/16", "include-outbound-ports": "80"},
            "10.96.0.1", 80, APP, DIRECT, "excluded-cidr",
        ),
        # A port counts outside the ranges, too.
        (
            {"include-outbound-cidrs": "10.1.0.0/16", "include-outbound-ports": "80"},
            "10.96.0.1", 80, APP, OUTBOUND, "included-port",
        ),
        ({"include-outbound-cidrs": "10.1.0.0/16"}, "10.96.0.1", 80, APP, DIRECT, "not-included"),
        ({"include-outbound-cidrs": "10.0.0.0/8"}, "fd96::1", 80, APP, DIRECT, "not-included"),
        ({"include-outbound-cidrs": ""}, "10.96.0.1", 80, APP, DIRECT, "not-included"),
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
    assert outbound({"proxy-gids": ""}, "10.96.0.1", gid=1337).verdict == OUTBOUND


@pytest.mark.parametrize(("source", "own"), [("127.0.0.6", "10.77.0.10"), ("::6", "fd77::a")])
def test_passthrough_is_direct_only_within_the_pod(source: str, own: str) -> None:
    assert outbound({}, own, uid=PROXY, source=source).rule == "outbound.passthrough"
    away = "10.96.0.1" if "." in own else "fd96::1"
    assert outbound({}, away, source=source).verdict == OUTBOUND


def test_unspecified_destination_is_the_bound_address() -> None:
    assert outbound({}, "0.0.0.0", uid=PROXY, source="10.77.0.10").verdict == INBOUND
    assert outbound({}, "0.0.0.0", uid=PROXY, source="0.0.0.0").verdict == DIRECT


@pytest.mark.parametrize(
    ("options", "port", "verdict", "rule"),
    [
        ({}, 80, INBOUND, "included-port"),
        ({}, 15006, INBOUND, "included-port"),
        ({}, 15008, DIRECT, "tunnel-port"),
        ({}, 15020, DIRECT, "excluded-port"),
        ({}, 15021, DIRECT, "excluded-port"),
        ({}, 15090, DIRECT, "excluded-port"),
        ({"exclude-inbound-ports": "80"}, 80, DIRECT, "excluded-port"),
        ({"exclude-inbound-ports": "80"}, 15090, INBOUND, "included-port"),
        # A list says it all: exclusions count only with *.
        ({"include-inbound-ports": "80,15090"}, 15090, INBOUND, "included-port"),
        ({"include-inbound-ports": "80", "exclude-inbound-ports": "80"}, 80, INBOUND,
         "included-port"),
        ({"include-inbound-ports": "80"}, 81, DIRECT, "not-included"),
        ({"include-inbound-ports": "15008"}, 15008, DIRECT, "tunnel-port"),
        ({"include-inbound-ports": ""}, 80, DIRECT, "not-included"),
    ],
)  # fmt: skip
def test_inbound(options: dict[str, str], port: int, verdict: Verdict, rule: str) -> None:
    connection = Connection(Direction.INBOUND, OWN[0], port, OWN)
    assert decide(parse(options), connection) == Decision(verdict, f"inbound.{rule}")


def test_nothing_named_is_the_default() -> None:
    assert parse({}) == Steering()
    assert parse({"include-outbound-cidrs": "*", "include-inbound-ports": "*"}) == Steering()


def test_every_field_has_its_option() -> None:
    assert sorted(option.field for option in OPTIONS) == sorted(Steering.__dataclass_fields__)


def test_all_options() -> None:
    assert parse(
        {
            "include-outbound-cidrs": "10.0.0.0/8, fd00::/8,192.0.2.1",
            "exclude-outbound-cidrs": "*",
            "include-outbound-ports": "80, 443",
            "exclude-outbound-ports": " ",
            "include-inbound-ports": "8080",
            "exclude-inbound-ports": "1,65535",
            "proxy-uids": "101,0,101",
            "proxy-gids": "102",
            "outbound-port": "1501",
            "inbound-port": "1506",
        }
    ) == Steering(
        proxy_uids=(101, 0),
        proxy_gids=(102,),
        outbound_port=1501,
        inbound_port=1506,
        include_outbound_cidrs=tuple(
            ip_network(text) for text in ("10.0.0.0/8", "fd00::/8", "192.0.2.1/32")
        ),
        exclude_outbound_cidrs=EVERYWHERE,
        include_outbound_ports=frozenset({80, 443}),
        exclude_outbound_ports=frozenset(),
        include_inbound_ports=frozenset({8080}),
        exclude_inbound_ports=frozenset({1, 65535}),
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("exclude-outbound-ports", "80,70000", "'70000' is not a port; give a number from 1 to"),
        ("exclude-outbound-ports", "0", "'0' is not a port"),
        ("include-outbound-ports", "*", "'*' is not a port"),
        ("include-outbound-ports", "8000-8010", "'8000-8010' is not a port"),
        ("include-inbound-ports", "80,*", "'*' is not a port"),
        ("include-inbound-ports", "80,,443", "'' is not a port"),
        ("exclude-inbound-ports", "٨٠", "'٨٠' is not a port"),
        ("outbound-port", "-1", "'-1' is not a port"),
        ("proxy-uids", "envoy", "'envoy' is not a user or group id; give a number from 0 to"),
        ("proxy-uids", "4294967295", "'4294967295' is not a user or group id"),
        ("include-outbound-cidrs", "10.0.0.0/33", "'10.0.0.0/33' is not an IP range; give an"),
        ("include-outbound-cidrs", "10.0.0.0-10.0.0.9", "'10.0.0.0-10.0.0.9' is not an IP range"),
        ("include-outbound-cidrs", "10.0.0.0/8,*", "'*' is not an IP range"),
        ("exclude-outbound-cidrs", "10.1.2.3/8", "has bits outside its prefix; write 10.0.0.0/8"),
        ("exclude-outbound-cidrs", "::ffff:10.0.0.0/104", "IPv4 written as IPv6"),
        ("exclude-outbound-cidrs", "::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
        ("inbound-port", "15001", "are both 15001"),
        ("exclude-ports", "80", "no such option; there are exclude-inbound-ports"),
    ],
)
def test_wrong_values_name_option_value_and_way_out(option: str, value: str, message: str) -> None:
    for prefix in ("--", "redirector.io/"):
        with pytest.raises(InputError) as caught:
            parse({option: value}, prefix=prefix)
        assert prefix + option in str(caught.value)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
