"""Which connection goes where, and how a user says so. Pure.

`decide` is what both modes must do on the kernel; the tests hold them to it. A table's first rule
that applies wins. The rules are those that users of Istio's sidecars know, for TCP.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any

from redirector.errors import InputError
from redirector.model import EVERYWHERE, IPAddress, IPNetwork, Steering

#: HBONE's port: bytes to it are a tunnel of the sidecar's own and never captured inbound.
TUNNEL_PORT = 15008
#: What "localhost" means; other addresses of 127/8 are loopback, but not these.
LOCALHOST: frozenset[IPAddress] = frozenset({IPv4Address("127.0.0.1"), IPv6Address("::1")})
#: The sidecar connects from these when it hands an inbound connection to the application.
PASSTHROUGH_V4, PASSTHROUGH_V6 = IPv4Address("127.0.0.6"), IPv6Address("::6")
PASSTHROUGH_SOURCES: frozenset[IPAddress] = frozenset({PASSTHROUGH_V4, PASSTHROUGH_V6})


class Direction(StrEnum):
    """Who connects: a process of the pod, or somebody outside it."""

    OUTBOUND = "outbound"
    INBOUND = "inbound"


class Verdict(StrEnum):
    """Where a connection goes: its destination, or one of the sidecar's listeners."""

    DIRECT = "direct"
    OUTBOUND = "outbound"
    INBOUND = "inbound"


@dataclass(frozen=True)
class Connection:
    """A TCP connection as its first packet shows it.

    `own` are the pod's addresses. `source` is the address it was bound to, if any. `uid` and `gid`
    are the effective ones of the connecting process; inbound they mean nothing.
    """

    direction: Direction
    destination: IPAddress
    port: int
    own: tuple[IPAddress, ...]
    source: IPAddress | None = None
    uid: int = 0
    gid: int = 0

    def __post_init__(self) -> None:
        source = None if self.source is None else _unmapped(self.source)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "destination", _as_routed(_unmapped(self.destination), source))

    @property
    def local(self) -> bool:
        """Whether it never leaves the pod: the kernel routes it over lo."""
        return self.destination.is_loopback or self.destination in self.own


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


def _as_routed(destination: IPAddress, source: IPAddress | None) -> IPAddress:
    """Return where connecting to the unspecified address leads.

    To the bound address or localhost in IPv4 (ip_route_output_key_hash_rcu), to localhost in IPv6
    (tcp_v6_connect).
    """
    if not destination.is_unspecified:
        return destination
    if destination.version == 6:
        return IPv6Address("::1")
    return IPv4Address("127.0.0.1") if source is None or source.is_unspecified else source


def _unmapped(address: IPAddress) -> IPAddress:
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
    return c.uid in s.proxy_uids[:1] and c.local and c.destination not in LOCALHOST


def _app_local(s: Steering, c: Connection) -> bool:
    if not c.local:
        return False
    return c.destination in LOCALHOST or not _within(c.destination, honoured_loopback(s))


OUTBOUND_RULES: tuple[Rule, ...] = (
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


@dataclass(frozen=True)
class Option:
    """One thing a user may set: `--NAME` of the command, `redirector.io/NAME` of a pod."""

    name: str
    metavar: str
    help: str
    #: (name as the user wrote it, value) -> the value of the Steering field of this name.
    read: Callable[[str, str], object]

    @property
    def field(self) -> str:
        """The Steering field's name."""
        return self.name.replace("-", "_")


def parse(values: Mapping[str, str], *, prefix: str = "--") -> Steering:
    """Return the Steering that these options ask for; what is not named keeps its default.

    Keys are `Option.name`s. InputError names the option, written with `prefix`, and the value.
    """
    known = {option.name: option for option in OPTIONS}
    fields: dict[str, Any] = {}
    for name, text in values.items():
        if name not in known:
            names = ", ".join(sorted(known))
            raise InputError(f"{prefix}{name}: no such option; there are {names}")
        fields[known[name].field] = known[name].read(prefix + name, text)
    steering = Steering(**fields)
    if steering.outbound_port == steering.inbound_port:
        raise InputError(
            f"{prefix}outbound-port and {prefix}inbound-port are both {steering.outbound_port};"
            " the sidecar's two listeners need a port each"
        )
    return steering


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")] if text.strip() else []


def _number(option: str, text: str, low: int, high: int, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        raise InputError(f"{option}: {text!r} is not {what}; give a number from {low} to {high}")
    return int(text)


def _port(option: str, text: str) -> int:
    return _number(option, text.strip(), 1, 65535, "a port")


def _ports(option: str, text: str) -> frozenset[int]:
    return frozenset(_port(option, item) for item in _items(text))


def _ports_or_all(option: str, text: str) -> frozenset[int] | None:
    return None if text.strip() == "*" else _ports(option, text)


def _ids(option: str, text: str) -> tuple[int, ...]:
    # The highest number means "no id" to the kernel (user_namespaces(7)).
    ids = (_number(option, item, 0, 2**32 - 2, "a user or group id") for item in _items(text))
    return tuple(dict.fromkeys(ids))


def _cidrs(option: str, text: str) -> tuple[IPNetwork, ...]:
    if text.strip() == "*":
        return EVERYWHERE
    return tuple(dict.fromkeys(_cidr(option, item) for item in _items(text)))


def _cidr(option: str, text: str) -> IPNetwork:
    hint = "give an address or a range such as 10.0.0.0/8 or fd00::/8"
    try:
        network: IPv4Network | IPv6Network = ip_network(text, strict=False)
        address = ip_address(text.partition("/")[0])
    except ValueError:
        raise InputError(f"{option}: {text!r} is not an IP range; {hint}") from None
    if address != network.network_address:
        raise InputError(f"{option}: {text!r} has bits outside its prefix; write {network}")
    if network.version == 6 and network.prefixlen >= 96 and _unmapped(address).version == 4:
        raise InputError(
            f"{option}: {text!r} is IPv4 written as IPv6, which the kernel treats as IPv4;"
            f" write {_unmapped(address)}/{network.prefixlen - 96}"
        )
    return network


OPTIONS: tuple[Option, ...] = (
    Option(
        "include-outbound-cidrs",
        "CIDRS",
        "connections to these ranges go to the sidecar (default: * for all)",
        _cidrs,
    ),
    Option("exclude-outbound-cidrs", "CIDRS", "connections to these ranges are direct", _cidrs),
    Option(
        "include-outbound-ports",
        "PORTS",
        "connections to these ports go to the sidecar, whatever their address",
        _ports,
    ),
    Option("exclude-outbound-ports", "PORTS", "connections to these ports are direct", _ports),
    Option(
        "include-inbound-ports",
        "PORTS",
        "connections from outside to these ports go to the sidecar (default: * for all)",
        _ports_or_all,
    ),
    Option(
        "exclude-inbound-ports",
        "PORTS",
        "with all inbound ports included: these are direct (default: 15020,15021,15090)",
        _ports,
    ),
    Option("proxy-uids", "UIDS", "users that are the sidecar (default: 1337)", _ids),
    Option("proxy-gids", "GIDS", "groups that are the sidecar (default: 1337)", _ids),
    Option("outbound-port", "PORT", "the sidecar's outbound listener (default: 15001)", _port),
    Option("inbound-port", "PORT", "the sidecar's inbound listener (default: 15006)", _port),
)
