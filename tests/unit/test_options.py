"""How a user's options are read."""

from ipaddress import IPv4Network, ip_address, ip_network

import pytest

from redirector.errors import InputError
from redirector.model import ANNOTATION, EVERYWHERE, Steering
from redirector.options import FLAG, OPTIONS, parse


def test_nothing_named_is_the_default() -> None:
    assert parse({}) == Steering()
    everything = ("includeOutboundIPRanges", "includeInboundPorts", "includeOwnerGroups")
    assert parse(dict.fromkeys(everything, "*")) == Steering()
    assert parse({"dnsServers": "*"}).dns_servers is None


def test_every_field_has_its_option() -> None:
    assert sorted(option.field for option in OPTIONS) == sorted(Steering.__dataclass_fields__)


def test_flags_are_the_names_in_kebab_case() -> None:
    flags = {option.name: option.flag for option in OPTIONS}
    assert flags["includeOutboundIPRanges"] == "include-outbound-ip-ranges"
    assert flags["proxyUID"] == "proxy-uid"
    assert flags["kubevirtInterfaces"] == "kubevirt-interfaces"


def test_all_options() -> None:
    assert parse(
        {
            "includeOutboundIPRanges": "10.0.0.0/8, fd00::/8,192.0.2.1",
            "excludeOutboundIPRanges": "*",
            "includeOutboundPorts": "80, 443",
            "excludeOutboundPorts": " ",
            "includeInboundPorts": "8080",
            "excludeInboundPorts": "1,65535",
            "proxyUID": "101,0,101",
            "proxyGID": "102",
            "excludeInterfaces": "eth1, net1.5",
            "kubevirtInterfaces": "k6t-eth0",
            "includeOwnerGroups": "5,6",
            "excludeOwnerGroups": "0",
            "dnsCapture": "true",
            "dnsServers": "10.96.0.10,fd96::a,::ffff:127.0.0.53",
            "hostLoopbackRange": "127.0.0.0/24",
            "outboundPort": "1501",
            "inboundPort": "1506",
            "dnsPort": "1553",
        }
    ) == Steering(
        proxy_uids=(101, 0),
        proxy_gids=(102,),
        outbound_port=1501,
        inbound_port=1506,
        dns_port=1553,
        include_outbound_cidrs=tuple(
            ip_network(text) for text in ("10.0.0.0/8", "fd00::/8", "192.0.2.1/32")
        ),
        exclude_outbound_cidrs=EVERYWHERE,
        include_outbound_ports=frozenset({80, 443}),
        exclude_outbound_ports=frozenset(),
        include_inbound_ports=frozenset({8080}),
        exclude_inbound_ports=frozenset({1, 65535}),
        exclude_interfaces=frozenset({"eth1", "net1.5"}),
        kubevirt_interfaces=frozenset({"k6t-eth0"}),
        include_owner_groups=frozenset({5, 6}),
        exclude_owner_groups=frozenset({0}),
        dns_capture=True,
        dns_servers=tuple(map(ip_address, ("10.96.0.10", "fd96::a", "127.0.0.53"))),
        host_loopback_range=IPv4Network("127.0.0.0/24"),
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("excludeOutboundPorts", "80,70000", "'70000' is not a port; give a number from 1 to"),
        ("excludeOutboundPorts", "0", "'0' is not a port"),
        ("includeOutboundPorts", "*", "'*' is not a port"),
        ("includeOutboundPorts", "8000-8010", "'8000-8010' is not a port"),
        ("includeInboundPorts", "80,*", "'*' is not a port"),
        ("includeInboundPorts", "80,,443", "'' is not a port"),
        ("excludeInboundPorts", "٨٠", "'٨٠' is not a port"),
        ("outboundPort", "-1", "'-1' is not a port"),
        ("inboundPort", "15008", "15008 is the tunnel's port, which is never captured"),
        ("proxyUID", "envoy", "'envoy' is not a user or group id; give a number from 0 to"),
        ("proxyUID", "4294967295", "'4294967295' is not a user or group id"),
        ("includeOutboundIPRanges", "10.0.0.0/33", "'10.0.0.0/33' is not an IP range; give an"),
        ("includeOutboundIPRanges", "10.0.0.0-10.0.0.9", "'10.0.0.0-10.0.0.9' is not an IP range"),
        ("includeOutboundIPRanges", "10.0.0.0/8,*", "'*' is not an IP range"),
        ("excludeOutboundIPRanges", "10.1.2.3/8", "has bits outside its prefix; write 10.0.0.0/8"),
        ("excludeOutboundIPRanges", "::ffff:10.0.0.0/104", "IPv4 written as IPv6"),
        ("excludeOutboundIPRanges", "::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
        ("excludeOutboundIPRanges", "fe80::1%eth0", "names an interface; write fe80::1"),
        ("includeOutboundIPRanges", "fe80::%eth0/64", "names an interface; write fe80::/64"),
        ("dnsServers", "10.0.0.10,fe80::1%2", "'fe80::1%2' names an interface; write fe80::1"),
        ("inboundPort", "15001", "are both 15001"),
        ("dnsPort", "15006", "are both 15006"),
        ("excludeInterfaces", "eth0,eth+", "'eth+' is not an interface's name; give names such"),
        ("kubevirtInterfaces", "a-name-of-16-char", "is not an interface's name"),
        ("includeOwnerGroups", "5,*", "'*' is not a user or group id"),
        ("excludeOwnerGroups", "staff", "'staff' is not a user or group id"),
        ("dnsCapture", "yes", "'yes' is neither true nor false"),
        ("dnsServers", "10.0.0.10,dns.local", "'dns.local' is not an IP address"),
        ("hostLoopbackRange", "10.0.0.0/8", "'10.0.0.0/8' is not inside 127.0.0.0/8"),
        ("hostLoopbackRange", "::1", "'::1' is not inside 127.0.0.0/8"),
    ],
)
def test_wrong_values_name_option_value_and_way_out(option: str, value: str, message: str) -> None:
    (flag,) = (known.flag for known in OPTIONS if known.name == option)
    for prefix, written in ((FLAG, f"--{flag}"), (ANNOTATION, f"redirector.io/{option}")):
        with pytest.raises(InputError) as caught:
            parse({option: value}, prefix=prefix)
        assert written in str(caught.value)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_unspecified_resolver_is_localhost() -> None:
    """As sockets take it (resolv.conf may name it)."""
    asked = parse({"dnsServers": "0.0.0.0,::"}).dns_servers
    assert asked == (ip_address("127.0.0.1"), ip_address("::1"))


def test_an_unknown_option_is_told_what_was_meant() -> None:
    with pytest.raises(InputError, match="redirector.io/excludeOutboundPort: no such option; "
                       r"did you mean redirector.io/excludeOutboundPorts\?"):  # fmt: skip
        parse({"excludeOutboundPort": "80"})
    with pytest.raises(InputError, match=r"there are .*redirector.io/proxyUID, "):
        parse({"xyzzy": "80"})
