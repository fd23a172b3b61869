"""The iptables mode's rules as text: what a dry run prints and the kernel is fed."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from redirector.model import Mode, Pod
from redirector.modes.iptables.sets import MOST_RULES, networks_set
from redirector.modes.iptables.transaction import rules
from redirector.options import parse

GOLDEN = Path(__file__).parent.parent / "golden/iptables"
CASES = {
    "defaults": {},
    "every-option": {
        "includeOutboundIPRanges": "10.0.0.0/8,127.1.0.0/16,fd00::/8",
        "excludeOutboundIPRanges": "10.1.0.0/16,fd01::/16",
        "includeOutboundPorts": "8443",
        "excludeOutboundPorts": "22,25",
        "includeInboundPorts": "80,8080",
        "proxyUID": "101,102",
        "proxyGID": "201,202",
        "includeOwnerGroups": "0,301",
        "excludeOwnerGroups": "302",
        "excludeInterfaces": "eth2",
        "kubevirtInterfaces": "k6t-eth0",
        "dnsCapture": "true",
        "dnsServers": "10.96.0.10,127.0.0.53,fd96::a",
        "hostLoopbackRange": "127.0.0.0/24",
        "dropInvalid": "true",
        "outboundPort": "1501",
        "inboundPort": "1506",
        "dnsPort": "1553",
    },
    # Of IPv6 no resolver is named: nothing of DNS is captured there.
    "dns-of-one-family": {"dnsCapture": "true", "dnsServers": "10.96.0.10"},
    "dns-of-anybody": {"dnsCapture": "true", "dnsServers": "*"},
    "dns-excluded-by-port": {
        "dnsCapture": "true",
        "dnsServers": "*",
        "excludeOutboundPorts": "53",
    },
    "nothing-steered": {
        "includeOutboundIPRanges": "",
        "includeInboundPorts": "",
        "proxyUID": "",
        "proxyGID": "",
    },
    # xt_multiport takes 15 ports.
    "many-ports": {"excludeOutboundPorts": ",".join(map(str, range(1, 32)))},
    # More than MOST_RULES of IPv4: a set; of IPv6 less: rules. No set holds a whole family.
    "long-list": {
        "includeOutboundIPRanges": ",".join(
            ["0.0.0.0/0", "fd00::/8", *(f"10.{number}.0.0/16" for number in range(33))]
        )
    },
}


def text(options: dict[str, str]) -> str:
    return rules(Pod("pod", Path(), Path(), Mode.IPTABLES, steering=parse(options)))


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, update_golden: bool) -> None:
    path = GOLDEN / f"{case}.rules"
    if update_golden:
        path.write_text(text(CASES[case]))
    assert text(CASES[case]) == path.read_text(), "run pytest --update-golden and read the diff"


def test_no_orphans(update_golden: bool) -> None:
    for orphan in (path for path in GOLDEN.iterdir() if path.stem not in CASES):
        assert update_golden, f"{orphan} has no case; run pytest --update-golden to remove it"
        orphan.unlink()


@pytest.mark.parametrize("case", CASES)
def test_only_what_opens_a_connection_meets_the_nat_rules(case: str) -> None:
    """conntrack would pick open streams up in their middle; of UDP only DNS is of interest."""
    nat = [part.partition("COMMIT")[0] for part in text(CASES[case]).split("*nat")[1:]]
    jumps = [
        line
        for part in nat
        for line in part.splitlines()
        if line.startswith(("-A OUTPUT", "-A PREROUTING"))
    ]
    assert len(jumps) >= 4
    assert all("-p tcp --syn " in jump or "-p udp --dport 53 " in jump for jump in jumps)


def test_the_mark_tells_rules_apart_that_have_the_same_names() -> None:
    def marks(options: dict[str, str]) -> set[str]:
        return {word for word in text(options).split() if word.startswith("redirector:")}

    assert marks({}) == marks({})
    assert not marks({}) & marks({"outboundPort": "1501"})


def test_a_set_may_be_printed_as_c_writes_addresses() -> None:
    asks = networks_set(6, [ip_network("::102:304"), ip_network("fd00::/8")])
    assert asks.holds(["::1.2.3.4", "fd00::/8"])
    assert not asks.holds(["::1.2.3.5", "fd00::/8"])
    assert not asks.holds(["fd00::/8"])


def test_a_long_list_of_ports_is_one_rule() -> None:
    def excluding(count: int) -> str:
        ports = ",".join(map(str, range(1, count + 1)))
        return text({"excludeOutboundPorts": ports})

    most = MOST_RULES * 15
    assert excluding(most).count("outbound.excluded-port") == 2 * MOST_RULES
    assert "ipset" not in excluding(most)
    longer = excluding(most + 1)
    assert longer.count("create ") == 1, "one set serves both families"
    assert longer.count("--match-set") == 2
    assert longer.count("\nadd ") == most + 1
