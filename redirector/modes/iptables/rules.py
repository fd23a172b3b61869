"""The decisions of `redirector.steering` as rules of the nat table. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from redirector.model import IPNetwork, Steering
from redirector.steering import TUNNEL_PORT, honoured_loopback

OUTPUT_CHAIN = "REDIRECTOR_OUTPUT"
INBOUND_CHAIN = "REDIRECTOR_INBOUND"
CHAINS = (OUTPUT_CHAIN, INBOUND_CHAIN)
#: What `remove` leaves while redirected connections are open; nothing jumps to it.
KEEP_CHAIN = "REDIRECTOR_KEEP"
OWN_CHAINS = (*CHAINS, KEEP_CHAIN)

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


IPV4 = Family(4, "iptables-restore", "iptables-save", "127.0.0.1/32", "127.0.0.6/32")
IPV6 = Family(6, "ip6tables-restore", "ip6tables-save", "::1/128", "::6/128")


@dataclass(frozen=True)
class NatRule:
    """One rule of a chain of ours, under the name of the steering rule that it carries out."""

    chain: str
    name: str
    match: str
    target: str

    def line(self) -> str:
        return f"-A {self.chain} {self.match} -m comment --comment {self.name} -j {self.target}"


@dataclass(frozen=True)
class Jump:
    """What sends packets from a base chain to a chain of ours."""

    base: str
    match: str
    chain: str


JUMPS = (
    Jump("OUTPUT", "-p tcp --syn", OUTPUT_CHAIN),
    # What comes over lo has been through OUTPUT: it is the pod's own, not from outside.
    Jump("PREROUTING", "! -i lo -p tcp --syn", INBOUND_CHAIN),
)


def ruleset(steering: Steering, family: Family) -> tuple[NatRule, ...]:
    """Return the rules of one family, in order."""
    return (*_output_rules(steering, family), *_inbound_rules(steering))


def _output_rules(steering: Steering, family: Family) -> Iterator[NatRule]:
    def rule(name: str, match: str, target: str) -> NatRule:
        return NatRule(OUTPUT_CHAIN, f"outbound.{name}", match, target)

    to_outbound = redirect(steering.outbound_port)
    to_inbound = redirect(steering.inbound_port)
    for ports in _multiports(steering.exclude_outbound_ports):
        yield rule("excluded-port", ports, "RETURN")
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
    for net in _of(family, steering.exclude_outbound_cidrs):
        yield rule("excluded-cidr", f"-d {net}", "RETURN")
    # Of what goes over lo, only loopback beside localhost can be captured, by naming its range.
    for net in _of(family, honoured_loopback(steering)):
        yield rule("included-cidr", f"-d {net} -o lo -p tcp", to_outbound)
    yield rule("app-local", "-o lo", "RETURN")
    for ports in _multiports(steering.include_outbound_ports):
        yield rule("included-port", ports, to_outbound)
    for net in _of(family, steering.include_outbound_cidrs):
        yield rule("included-cidr", f"-d {net} -p tcp", to_outbound)


def _inbound_rules(steering: Steering) -> Iterator[NatRule]:
    def rule(name: str, match: str, target: str) -> NatRule:
        return NatRule(INBOUND_CHAIN, f"inbound.{name}", match, target)

    to_inbound = redirect(steering.inbound_port)
    yield rule("tunnel-port", f"-p tcp --dport {TUNNEL_PORT}", "RETURN")
    if steering.include_inbound_ports is None:
        for ports in _multiports(steering.exclude_inbound_ports):
            yield rule("excluded-port", ports, "RETURN")
        yield rule("included-port", "-p tcp", to_inbound)
    else:
        for ports in _multiports(steering.include_inbound_ports):
            yield rule("included-port", ports, to_inbound)


def redirect(port: int) -> str:
    return f"REDIRECT --to-ports {port}"


def _of(family: Family, networks: Iterable[IPNetwork]) -> Iterator[IPNetwork]:
    return (net for net in networks if net.version == family.version)


def _multiports(ports: frozenset[int]) -> Iterator[str]:
    ordered = [str(port) for port in sorted(ports)]
    for start in range(0, len(ordered), _MULTIPORT):
        yield f"-p tcp -m multiport --dports {','.join(ordered[start : start + _MULTIPORT])}"
