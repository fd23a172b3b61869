"""Which connection goes where. Pure; how a user says so is in `redirector.options`.

`decide` is what both modes must do on the kernel; the tests hold them to it. A table's first rule
that applies wins. The rules are those that users of Istio's sidecars know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

from redirector.model import IPAddress, IPNetwork, Steering

#: HBONE's port: bytes to it are a tunnel of the sidecar's own and never captured inbound.
TUNNEL_PORT = 15008
DNS_PORT = 53
#: The host itself in IPv6; in IPv4 that is `Steering.host_loopback_range`.
LOCALHOST_V6 = IPv6Address("::1")
#: The sidecar connects from these when it hands an inbound connection to the application.
PASSTHROUGH_V4, PASSTHROUGH_V6 = IPv4Address("127.0.0.6"), IPv6Address("::6")
PASSTHROUGH_SOURCES: frozenset[IPAddress] = frozenset({PASSTHROUGH_V4, PASSTHROUGH_V6})


class Direction(StrEnum):
    """Who connects: a process of the pod, or somebody outside it."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"


class Protocol(StrEnum):
    """What carries a connection; of UDP, its first packet stands for it."""

    TCP = "tcp"
    UDP = "udp"


class Verdict(StrEnum):
    """Where a connection goes: its destination, or one of the sidecar's listeners."""

    DIRECT = "direct"
    OUTBOUND = "outbound"
    INBOUND = "inbound"
    DNS = "dns"


@dataclass(frozen=True)
class Connection:
    """A connection as its first packet shows it.

    `own` are the pod's addresses. `source` is the address it was bound to, if any. `uid` and `gid`
    are the effective ones of the process that made the socket; inbound they mean nothing.
    `interface` is the one that it leaves by (lo, when it stays in the pod) or comes in by; empty
    when nobody knows.
    """

    direction: Direction
    destination: IPAddress
    port: int
    own: tuple[IPAddress, ...]
    source: IPAddress | None = None
    uid: int = 0
    gid: int = 0
    protocol: Protocol = Protocol.TCP
    interface: str = ""

    def __post_init__(self) -> None:
        source = None if self.source is None else unmapped(self.source)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "destination", as_routed(unmapped(self.destination), source))
        if self.direction is Direction.OUTBOUND and self.local:
            object.__setattr__(self, "interface", "lo")

    @property
    def local(self) -> bool:
        """Whether it never leaves the pod: the kernel routes it over lo."""
        here = self.destination in self.own or self.destination in PASSTHROUGH_SOURCES
        return here or self.destination.is_loopback


@dataclass(frozen=True)
class Rule:
    """One line of a table."""

    name: str
    applies: Callable[[Steering, Connection], bool]
    verdict: Verdict


@dataclass(frozen=True)
class Decision:
    """What happens to a connection, and the name of the rule that says so."""

    verdict: Verdict
    rule: str


def decide(steering: Steering, connection: Connection) -> Decision:
    """Return the decision of the first rule that applies; the last rule of a table always does."""
    table = OUTBOUND_RULES if connection.direction is Direction.OUTBOUND else INBOUND_RULES
    rule = next(rule for rule in table if rule.applies(steering, connection))
    return Decision(rule.verdict, rule.name)


def honoured_loopback(steering: Steering) -> tuple[IPNetwork, ...]:
    """Return the included ranges inside loopback: only naming one captures loopback addresses."""
    return tuple(net for net in steering.include_outbound_cidrs if net.is_loopback)


def is_host(steering: Steering, address: IPAddress) -> bool:
    """Whether it means the host itself, which sidecar and application reach directly."""
    if address.version == 6:
        return address == LOCALHOST_V6
    return address in steering.host_loopback_range


def as_routed(destination: IPAddress, source: IPAddress | None = None) -> IPAddress:
    """Return where connecting to the unspecified address leads.

    To the bound address or localhost in IPv4 (ip_route_output_key_hash_rcu), to localhost in IPv6
    (tcp_v6_connect), of the family that the socket is bound to.
    """
    if not destination.is_unspecified:
        return destination
    bound_v4 = source is not None and source.version == 4
    if destination.version == 6:
        return IPv4Address("127.0.0.1") if bound_v4 else LOCALHOST_V6
    if source is None or not bound_v4 or source.is_unspecified:
        return IPv4Address("127.0.0.1")
    return source


def unmapped(address: IPAddress) -> IPAddress:
    """Return what the kernel makes of an address: ::ffff:a.b.c.d is IPv4."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _within(address: IPAddress, ranges: tuple[IPNetwork, ...]) -> bool:
    return any(address in net for net in ranges)


def _always(_steering: Steering, _connection: Connection) -> bool:
    return True


def _passthrough(_steering: Steering, c: Connection) -> bool:
    return c.source in PASSTHROUGH_SOURCES and c.local


def _proxy_self(s: Steering, c: Connection) -> bool:
    # Of several proxies only the first answers for the pod, as the injector sets it up.
    if c.protocol is not Protocol.TCP or c.uid not in s.proxy_uids[:1]:
        return False
    # What it asks of a resolver is never sent through the sidecar again.
    if s.dns_capture and c.port == DNS_PORT:
        return False
    return c.local and not is_host(s, c.destination)


def _dns(s: Steering, c: Connection) -> bool:
    if not s.dns_capture or c.port != DNS_PORT:
        return False
    return s.dns_servers is None or c.destination in s.dns_servers


def _app_local(s: Steering, c: Connection) -> bool:
    if not c.local:
        return False
    return is_host(s, c.destination) or not _within(c.destination, honoured_loopback(s))


def _not_tcp(_steering: Steering, c: Connection) -> bool:
    return c.protocol is not Protocol.TCP


OUTBOUND_RULES: tuple[Rule, ...] = (
    Rule(
        "outbound.excluded-interface",
        lambda s, c: c.interface in s.exclude_interfaces,
        Verdict.DIRECT,
    ),
    Rule(
        "outbound.excluded-port",
        lambda s, c: c.port in s.exclude_outbound_ports,
        Verdict.DIRECT,
    ),
    Rule("outbound.passthrough", _passthrough, Verdict.DIRECT),
    Rule(
        "outbound.proxy-tunnel",
        lambda s, c: c.port == TUNNEL_PORT and _proxy_self(s, c),
        Verdict.DIRECT,
    ),
    Rule("outbound.proxy-self", _proxy_self, Verdict.INBOUND),
    Rule("outbound.proxy-uid", lambda s, c: c.uid in s.proxy_uids, Verdict.DIRECT),
    Rule("outbound.proxy-gid", lambda s, c: c.gid in s.proxy_gids, Verdict.DIRECT),
    Rule(
        "outbound.excluded-group",
        lambda s, c: c.gid in s.exclude_owner_groups,
        Verdict.DIRECT,
    ),
    Rule(
        "outbound.group-not-included",
        lambda s, c: s.include_owner_groups is not None and c.gid not in s.include_owner_groups,
        Verdict.DIRECT,
    ),
    Rule("outbound.dns", _dns, Verdict.DNS),
    Rule("outbound.not-tcp", _not_tcp, Verdict.DIRECT),
    Rule("outbound.app-local", _app_local, Verdict.DIRECT),
    Rule(
        "outbound.excluded-cidr",
        lambda s, c: _within(c.destination, s.exclude_outbound_cidrs),
        Verdict.DIRECT,
    ),
    Rule(
        "outbound.included-port",
        lambda s, c: c.port in s.include_outbound_ports,
        Verdict.OUTBOUND,
    ),
    Rule(
        "outbound.included-cidr",
        lambda s, c: _within(c.destination, s.include_outbound_cidrs),
        Verdict.OUTBOUND,
    ),
    Rule("outbound.not-included", _always, Verdict.DIRECT),
)

INBOUND_RULES: tuple[Rule, ...] = (
    Rule("inbound.not-tcp", _not_tcp, Verdict.DIRECT),
    Rule(
        "inbound.excluded-interface",
        lambda s, c: c.interface in s.exclude_interfaces,
        Verdict.DIRECT,
    ),
    # Behind these are virtual machines of the pod: what they open is outbound.
    Rule(
        "inbound.kubevirt-included",
        lambda s, c: (
            c.interface in s.kubevirt_interfaces
            and _within(c.destination, s.include_outbound_cidrs)
        ),
        Verdict.OUTBOUND,
    ),
    Rule("inbound.kubevirt", lambda s, c: c.interface in s.kubevirt_interfaces, Verdict.DIRECT),
    Rule("inbound.tunnel-port", lambda _s, c: c.port == TUNNEL_PORT, Verdict.DIRECT),
    # An exclusion means something only where everything is included; a list says it all itself.
    Rule(
        "inbound.excluded-port",
        lambda s, c: s.include_inbound_ports is None and c.port in s.exclude_inbound_ports,
        Verdict.DIRECT,
    ),
    Rule(
        "inbound.included-port",
        lambda s, c: s.include_inbound_ports is None or c.port in s.include_inbound_ports,
        Verdict.INBOUND,
    ),
    Rule("inbound.not-included", _always, Verdict.DIRECT),
)

#: In the order of `enum rule`, bpf/sockops/layout.h.
RULES = (*OUTBOUND_RULES, *INBOUND_RULES)
