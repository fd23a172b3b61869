"""The decisions of `redirector.steering` as rules of the kernel's tables. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from redirector.model import IPNetwork, Steering
from redirector.modes.iptables.sets import MOST_RULES, IpSet, networks_set, ports_set
from redirector.steering import TUNNEL_PORT, honoured_loopback

OUTPUT_CHAIN = "REDIRECTOR_OUTPUT"
INBOUND_CHAIN = "REDIRECTOR_INBOUND"
#: What `remove` leaves while redirected connections are open; nothing jumps to it.
KEEP_CHAIN = "REDIRECTOR_KEEP"

#: xt_multiport takes this many ports (XT_MULTI_PORTS).
_MULTIPORT = 15


@dataclass(frozen=True)
class Family:
    """What differs between IPv4 and IPv6."""

    version: int
    restore: str
    save: str
    localhost: str
    passthrough: str
    everywhere: str


IPV4 = Family(4, "iptables-restore", "iptables-save", "127.0.0.1/32", "127.0.0.6/32", "0.0.0.0/0")
IPV6 = Family(6, "ip6tables-restore", "ip6tables-save", "::1/128", "::6/128", "::/0")


class Table(StrEnum):
    """The tables that hold rules of ours."""

    NAT = "nat"


#: Our chains while a pod is steered, and whose they are.
CHAINS = {OUTPUT_CHAIN: Table.NAT, INBOUND_CHAIN: Table.NAT}
#: Every chain that is ours.
OWN_CHAINS = {**CHAINS, KEEP_CHAIN: Table.NAT}


@dataclass(frozen=True)
class Rule:
    """One rule of a chain of ours, under the name of the steering rule that it carries out."""

    chain: str
    name: str
    match: str
    target: str
    #: The set that `match` names.
    asks: IpSet | None = None

    def line(self) -> str:
        return f"-A {self.chain} {self.match} -m comment --comment {self.name} -j {self.target}"


@dataclass(frozen=True)
class Jump:
    """What sends packets from a base chain to a chain of ours, of the same table."""

    base: str
    match: str
    chain: str


JUMPS = (
    Jump("OUTPUT", "-p tcp --syn", OUTPUT_CHAIN),
    # What comes over lo has been through OUTPUT: it is the pod's own, not from outside.
    Jump("PREROUTING", "! -i lo -p tcp --syn", INBOUND_CHAIN),
)


def ruleset(steering: Steering, family: Family) -> tuple[Rule, ...]:
    """Return the rules of one family, in order."""
    return (*_output_rules(steering, family), *_inbound_rules(steering))


#: What a rule applies to, and the set that it asks, if any.
_Match = tuple[str, IpSet | None]


def _output_rules(steering: Steering, family: Family) -> Iterator[Rule]:
    def rule(name: str, match: str, target: str, asks: IpSet | None = None) -> Rule:
        return Rule(OUTPUT_CHAIN, f"outbound.{name}", match, target, asks)

    to_outbound = redirect(steering.outbound_port)
    to_inbound = redirect(steering.inbound_port)
    for match, asks in _ports(steering.exclude_outbound_ports):
        yield rule("excluded-port", f"-p tcp {match}", "RETURN", asks)
    yield rule("passthrough", f"-s {family.passthrough} -o lo", "RETURN")
    for uid in steering.proxy_uids[:1]:
        yield rule(
            "proxy-self",
            f"! -d {family.localhost} -o lo -p tcp ! --dport {TUNNEL_PORT}"
            f" -m owner --uid-owner {uid}",
            to_inbound,
        )
    for uid in steering.proxy_uids:
        yield rule("proxy-uid", f"-m owner --uid-owner {uid}", "RETURN")
    for gid in steering.proxy_gids:
        yield rule("proxy-gid", f"-m owner --gid-owner {gid}", "RETURN")
    yield rule("app-local", f"-d {family.localhost}", "RETURN")
    for match, asks in _networks(family, steering.exclude_outbound_cidrs):
        yield rule("excluded-cidr", match, "RETURN", asks)
    # Of what goes over lo, only loopback beside localhost can be captured, by naming its range.
    for match, asks in _networks(family, honoured_loopback(steering)):
        yield rule("included-cidr", f"{match} -o lo -p tcp", to_outbound, asks)
    yield rule("app-local", "-o lo", "RETURN")
    for match, asks in _ports(steering.include_outbound_ports):
        yield rule("included-port", f"-p tcp {match}", to_outbound, asks)
    for match, asks in _networks(family, steering.include_outbound_cidrs):
        yield rule("included-cidr", f"{match} -p tcp", to_outbound, asks)


def _inbound_rules(steering: Steering) -> Iterator[Rule]:
    def rule(name: str, match: str, target: str, asks: IpSet | None = None) -> Rule:
        return Rule(INBOUND_CHAIN, f"inbound.{name}", match, target, asks)

    to_inbound = redirect(steering.inbound_port)
    yield rule("tunnel-port", f"-p tcp --dport {TUNNEL_PORT}", "RETURN")
    if steering.include_inbound_ports is None:
        for match, asks in _ports(steering.exclude_inbound_ports):
            yield rule("excluded-port", f"-p tcp {match}", "RETURN", asks)
        yield rule("included-port", "-p tcp", to_inbound)
    else:
        for match, asks in _ports(steering.include_inbound_ports):
            yield rule("included-port", f"-p tcp {match}", to_inbound, asks)


def redirect(port: int) -> str:
    return f"REDIRECT --to-ports {port}"


def _networks(family: Family, networks: Iterable[IPNetwork]) -> Iterator[_Match]:
    """Yield what matches destinations in these, as far as they are of the family."""
    own = [net for net in networks if net.version == family.version]
    # No set can hold a whole family.
    partial = [net for net in own if net.prefixlen]
    if len(partial) <= MOST_RULES:
        yield from ((f"-d {net}", None) for net in own)
        return
    if len(partial) < len(own):
        yield f"-d {family.everywhere}", None
    asks = networks_set(family.version, partial)
    yield asks.match, asks


def _ports(ports: frozenset[int]) -> Iterator[_Match]:
    """Yield what matches these destination ports; the protocol must be asked for beside it."""
    if len(ports) > MOST_RULES * _MULTIPORT:
        asks = ports_set(ports)
        yield asks.match, asks
        return
    ordered = [str(port) for port in sorted(ports)]
    for start in range(0, len(ordered), _MULTIPORT):
        yield f"-m multiport --dports {','.join(ordered[start : start + _MULTIPORT])}", None
