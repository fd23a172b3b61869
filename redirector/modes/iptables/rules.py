"""The decisions of `redirector.steering` as rules of the kernel's tables. Pure."""

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

from redirector.model import IPNetwork, Steering
from redirector.modes.iptables.sets import MOST_RULES, IpSet, networks_set, ports_set
from redirector.modes.iptables.tables import (
    DNS_CHAIN,
    DROP_CHAIN,
    INBOUND_CHAIN,
    OUTPUT_CHAIN,
    Family,
    Jump,
    Rule,
)
from redirector.steering import DNS_PORT, LOCALHOST_V6, TUNNEL_PORT, honoured_loopback

#: xt_multiport takes this many ports (XT_MULTI_PORTS).
_MULTIPORT = 15
_DNS_QUERY = f"-p udp --dport {DNS_PORT}"
_INVALID = "-m conntrack --ctstate INVALID"
#: What a rule applies to, and the set that it asks, if any.
_Match = tuple[str, IpSet | None]


def ruleset(steering: Steering, family: Family) -> tuple[Rule, ...]:
    """Return the rules of one family, in order."""
    return (
        *_dns_rules(steering, family),
        *_drop_rules(steering),
        *_output_rules(steering, family),
        *_inbound_rules(steering, family),
    )


def jumps(steering: Steering, family: Family) -> Iterator[Jump]:
    """Yield what leads to the rules; a chain that no jump leads to is not made."""
    if _captures_dns(steering, family):
        yield Jump("OUTPUT", _DNS_QUERY, DNS_CHAIN)
        yield dns_answers(steering)[0]
    if steering.drop_invalid:
        yield Jump("PREROUTING", _INVALID, DROP_CHAIN)
    yield Jump("OUTPUT", "-p tcp --syn", OUTPUT_CHAIN)
    if _captures_dns(steering, family):
        yield Jump("OUTPUT", _DNS_QUERY, OUTPUT_CHAIN)
    # What comes over lo has been through OUTPUT: it is the pod's own, not from outside.
    yield Jump("PREROUTING", "! -i lo -p tcp --syn", INBOUND_CHAIN)


def redirect(port: int) -> str:
    return f"REDIRECT --to-ports {port}"


def dns_answers(steering: Steering) -> tuple[Jump, Rule]:
    """Return what brings the sidecar's answers to the zone of the questions (see `_dns_rules`)."""
    match = f"-p udp --sport {steering.dns_port}"
    return (
        Jump("OUTPUT", match, DNS_CHAIN),
        Rule(DNS_CHAIN, "dns-answer", match, _zone(steering)),
    )


def _dns_rules(steering: Steering, family: Family) -> Iterator[Rule]:
    """Captured questions, and the answers to them, are tracked in a zone of their own.

    Otherwise a question of the sidecar's own, from a port that an application asked from a moment
    ago, would be taken for that application's and sent back to the sidecar.
    """
    if not _captures_dns(steering, family):
        return
    yield dns_answers(steering)[1]
    yield from _excluded_interfaces(steering, DNS_CHAIN)
    yield _passthrough(family, DNS_CHAIN)
    yield from _direct_by_owner(steering, DNS_CHAIN)
    for match, asks in _resolvers(steering, family):
        yield Rule(DNS_CHAIN, "outbound.dns", f"{match} {_DNS_QUERY}", _zone(steering), asks)


def _drop_rules(steering: Steering) -> Iterator[Rule]:
    if steering.drop_invalid:
        yield Rule(DROP_CHAIN, "drop-invalid", _INVALID, "DROP")


def _output_rules(steering: Steering, family: Family) -> Iterator[Rule]:
    def rule(name: str, match: str, target: str, asks: IpSet | None = None) -> Rule:
        return Rule(OUTPUT_CHAIN, f"outbound.{name}", match, target, asks)

    localhost = _localhost(steering, family)
    to_outbound = redirect(steering.outbound_port)
    yield from _excluded_interfaces(steering, OUTPUT_CHAIN)
    # UDP meets these rules for port 53 alone, and not when that is excluded.
    for match, asks in _ports(steering.exclude_outbound_ports):
        yield rule("excluded-port", f"-p tcp {match}", "RETURN", asks)
    yield _passthrough(family, OUTPUT_CHAIN)
    for uid in steering.proxy_uids[:1]:
        not_its_own = f"{DNS_PORT},{TUNNEL_PORT}" if steering.dns_capture else f"{TUNNEL_PORT}"
        yield rule(
            "proxy-self",
            f"! -d {localhost} -o lo -p tcp -m multiport ! --dports {not_its_own}"
            f" -m owner --uid-owner {uid}",
            redirect(steering.inbound_port),
        )
    yield from _direct_by_owner(steering, OUTPUT_CHAIN)
    if _captures_dns(steering, family):
        for match, asks in _resolvers(steering, family):
            for protocol in ("tcp", "udp"):
                query = f"{match} -p {protocol} --dport {DNS_PORT}"
                yield rule("dns", query, redirect(steering.dns_port), asks)
        yield rule("not-tcp", "-p udp", "RETURN")
    yield rule("app-local", f"-d {localhost}", "RETURN")
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


def _excluded_interfaces(steering: Steering, chain: str) -> Iterator[Rule]:
    for interface in sorted(steering.exclude_interfaces):
        yield Rule(chain, "outbound.excluded-interface", f"-o {interface}", "RETURN")


def _passthrough(family: Family, chain: str) -> Rule:
    return Rule(chain, "outbound.passthrough", f"-s {family.passthrough} -o lo", "RETURN")


def _direct_by_owner(steering: Steering, chain: str) -> Iterator[Rule]:
    def rule(name: str, match: str) -> Rule:
        return Rule(chain, f"outbound.{name}", match, "RETURN")

    for uid in steering.proxy_uids:
        yield rule("proxy-uid", f"-m owner --uid-owner {uid}")
    for gid in steering.proxy_gids:
        yield rule("proxy-gid", f"-m owner --gid-owner {gid}")
    for gid in sorted(steering.exclude_owner_groups):
        yield rule("excluded-group", f"-m owner --gid-owner {gid}")
    if steering.include_owner_groups is not None:
        groups = sorted(steering.include_owner_groups)
        none_of = " ".join(f"-m owner ! --gid-owner {gid}" for gid in groups)
        yield rule("group-not-included", none_of)


def _inbound_rules(steering: Steering, family: Family) -> Iterator[Rule]:
    def rule(name: str, match: str, target: str, asks: IpSet | None = None) -> Rule:
        return Rule(INBOUND_CHAIN, f"inbound.{name}", match, target, asks)

    to_inbound = redirect(steering.inbound_port)
    for interface in sorted(steering.exclude_interfaces):
        yield rule("excluded-interface", f"-i {interface}", "RETURN")
    for interface in sorted(steering.kubevirt_interfaces):
        for match, asks in _networks(family, steering.include_outbound_cidrs):
            included = f"-i {interface} {match} -p tcp"
            yield rule("kubevirt-included", included, redirect(steering.outbound_port), asks)
        yield rule("kubevirt", f"-i {interface}", "RETURN")
    yield rule("tunnel-port", f"-p tcp --dport {TUNNEL_PORT}", "RETURN")
    if steering.include_inbound_ports is None:
        for match, asks in _ports(steering.exclude_inbound_ports):
            yield rule("excluded-port", f"-p tcp {match}", "RETURN", asks)
        yield rule("included-port", "-p tcp", to_inbound)
    else:
        for match, asks in _ports(steering.include_inbound_ports):
            yield rule("included-port", f"-p tcp {match}", to_inbound, asks)


def _localhost(steering: Steering, family: Family) -> str:
    return str(steering.host_loopback_range) if family.version == 4 else f"{LOCALHOST_V6}/128"


def _zone(steering: Steering) -> str:
    # Any number but 0, where everything else is.
    return f"CT --zone {steering.dns_port}"


def _captures_dns(steering: Steering, family: Family) -> bool:
    return (
        steering.dns_capture
        and DNS_PORT not in steering.exclude_outbound_ports
        and any(True for _ in _resolvers(steering, family))
    )


def _resolvers(steering: Steering, family: Family) -> Iterator[_Match]:
    if steering.dns_servers is None:
        yield f"-d {family.everywhere}", None
    else:
        yield from _networks(family, map(ip_network, steering.dns_servers))


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
