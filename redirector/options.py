"""How a user says which connections are steered: the options and their text forms. Pure."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from itertools import combinations
from typing import Any

from redirector.errors import InputError
from redirector.model import ANNOTATION, EVERYWHERE, IPAddress, IPNetwork, Steering
from redirector.steering import TUNNEL_PORT, as_routed, unmapped

#: What options of the command line begin with.
FLAG = "--"
_LOOPBACK = IPv4Network("127.0.0.0/8")


@dataclass(frozen=True)
class Option:
    """One thing a user may set: `NAME` in a file, `redirector.io/NAME` of a pod, `--flag`."""

    name: str
    #: Of Steering.
    field: str
    metavar: str
    help: str
    #: (name as the user wrote it, value) -> the value of the field.
    read: Callable[[str, str], object]

    @property
    def flag(self) -> str:
        """The name in the command line's way, without the dashes."""
        return _flag(self.name)

    @property
    def destination(self) -> str:
        """Where argparse keeps it."""
        return self.flag.replace("-", "_")


def parse(values: Mapping[str, str], *, prefix: str = ANNOTATION) -> Steering:
    """Return the Steering that these options ask for; what is not named keeps its default.

    Keys are `Option.name`s. InputError names the option, as written with `prefix`, and the value.
    """
    return parse_written(values, lambda name: written(prefix, name))


def parse_written(values: Mapping[str, str], as_written: Callable[[str], str]) -> Steering:
    """The same, of options that were written in several ways: `as_written` tells how by name."""
    known = {option.name: option for option in OPTIONS}
    fields: dict[str, Any] = {}
    for name, text in values.items():
        if name not in known:
            raise InputError(f"{as_written(name)}: no such option; {_instead(name, as_written)}")
        fields[known[name].field] = known[name].read(as_written(name), text)
    steering = Steering(**fields)
    listeners = [(name, getattr(steering, known[name].field)) for name in _LISTENERS]
    for name, port in listeners:
        if port == TUNNEL_PORT:
            raise InputError(
                f"{as_written(name)}: {port} is the tunnel's port, which is never captured; "
                "give another one"
            )
    for (one, port), (other, same) in combinations(listeners, 2):
        if port == same:
            raise InputError(
                f"{as_written(one)} and {as_written(other)} are both {port};"
                " the sidecar's listeners need a port each"
            )
    return steering


def written(prefix: str, name: str) -> str:
    """How an option is called where options begin with this."""
    return prefix + (_flag(name) if prefix == FLAG else name)


def _flag(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def _instead(name: str, as_written: Callable[[str], str]) -> str:
    names = {option.name.lower(): option.name for option in OPTIONS}
    close = get_close_matches(name.lower(), names, n=1)
    if close:
        return f"did you mean {as_written(names[close[0]])}?"
    return f"there are {', '.join(as_written(option.name) for option in OPTIONS)}"


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


def _require_no_interface(option: str, text: str) -> None:
    """What ipaddress takes for a part of an IPv6 address (RFC 4007, 11) no rule compares."""
    address, percent, rest = text.partition("%")
    if percent:
        bare = address + "".join(rest.partition("/")[1:])
        raise InputError(f"{option}: {text!r} names an interface; write {bare}")


def _cidr(option: str, text: str) -> IPNetwork:
    hint = "give an address or a range such as 10.0.0.0/8 or fd00::/8"
    _require_no_interface(option, text)
    try:
        network: IPv4Network | IPv6Network = ip_network(text, strict=False)
        address = ip_address(text.partition("/")[0])
    except ValueError:
        raise InputError(f"{option}: {text!r} is not an IP range; {hint}") from None
    if address != network.network_address:
        raise InputError(f"{option}: {text!r} has bits outside its prefix; write {network}")
    if network.version == 6 and network.prefixlen >= 96 and unmapped(address).version == 4:
        raise InputError(
            f"{option}: {text!r} is IPv4 written as IPv6, which the kernel treats as IPv4;"
            f" write {unmapped(address)}/{network.prefixlen - 96}"
        )
    return network


def _ids_or_all(option: str, text: str) -> frozenset[int] | None:
    return None if text.strip() == "*" else frozenset(_ids(option, text))


def _id_set(option: str, text: str) -> frozenset[int]:
    return frozenset(_ids(option, text))


def _interfaces(option: str, text: str) -> frozenset[str]:
    # dev_valid_name() allows more, but iptables means a prefix by a plus at the end.
    for item in _items(text):
        if not re.fullmatch(r"[A-Za-z0-9_.@-]{1,15}", item) or item in (".", ".."):
            raise InputError(
                f"{option}: {item!r} is not an interface's name; give names such as eth1"
            )
    return frozenset(_items(text))


def _switch(option: str, text: str) -> bool:
    if text.strip() not in ("true", "false"):
        raise InputError(f"{option}: {text!r} is neither true nor false; give one of them")
    return text.strip() == "true"


def _resolvers(option: str, text: str) -> tuple[IPAddress, ...] | None:
    if text.strip() == "*":
        return None
    return tuple(dict.fromkeys(_resolver(option, item) for item in _items(text)))


def _resolver(option: str, text: str) -> IPAddress:
    _require_no_interface(option, text)
    try:
        return as_routed(unmapped(ip_address(text)))
    except ValueError:
        raise InputError(
            f"{option}: {text!r} is not an IP address; give the resolvers' addresses, or * for any"
        ) from None


def _loopback_range(option: str, text: str) -> IPv4Network:
    network = _cidr(option, text.strip())
    if not isinstance(network, IPv4Network) or not network.subnet_of(_LOOPBACK):
        raise InputError(f"{option}: {text!r} is not inside {_LOOPBACK}; give a range in it")
    return network


_LISTENERS = ("outboundPort", "inboundPort", "dnsPort")
OPTIONS: tuple[Option, ...] = (
    Option(
        "includeOutboundIPRanges",
        "include_outbound_cidrs",
        "CIDRS",
        "connections to these ranges go to the sidecar (default: * for all)",
        _cidrs,
    ),
    Option(
        "excludeOutboundIPRanges",
        "exclude_outbound_cidrs",
        "CIDRS",
        "connections to these ranges are direct",
        _cidrs,
    ),
    Option(
        "includeOutboundPorts",
        "include_outbound_ports",
        "PORTS",
        "connections to these ports go to the sidecar, whatever their address",
        _ports,
    ),
    Option(
        "excludeOutboundPorts",
        "exclude_outbound_ports",
        "PORTS",
        "connections to these ports are direct; 53 turns DNS capture off",
        _ports,
    ),
    Option(
        "includeInboundPorts",
        "include_inbound_ports",
        "PORTS",
        "connections from outside to these ports go to the sidecar (default: * for all)",
        _ports_or_all,
    ),
    Option(
        "excludeInboundPorts",
        "exclude_inbound_ports",
        "PORTS",
        "with all inbound ports included: these are direct (default: 15020,15021,15090)",
        _ports,
    ),
    Option(
        "excludeInterfaces",
        "exclude_interfaces",
        "NAMES",
        "what goes out or comes in through these interfaces is direct",
        _interfaces,
    ),
    Option(
        "kubevirtInterfaces",
        "kubevirt_interfaces",
        "NAMES",
        "what virtual machines behind these interfaces open counts as outbound",
        _interfaces,
    ),
    Option(
        "proxyUID",
        "proxy_uids",
        "UIDS",
        "users that are the sidecar; the first one's calls to the pod itself are inbound"
        " (default: 1337)",
        _ids,
    ),
    Option("proxyGID", "proxy_gids", "GIDS", "groups that are the sidecar (default: 1337)", _ids),
    Option(
        "includeOwnerGroups",
        "include_owner_groups",
        "GIDS",
        "only processes of these effective groups are captured (default: * for all)",
        _ids_or_all,
    ),
    Option(
        "excludeOwnerGroups",
        "exclude_owner_groups",
        "GIDS",
        "processes of these effective groups are direct",
        _id_set,
    ),
    Option(
        "dnsCapture",
        "dns_capture",
        "BOOL",
        "what is asked of the resolvers goes to the sidecar, UDP and TCP (default: false)",
        _switch,
    ),
    Option(
        "dnsServers",
        "dns_servers",
        "IPS",
        "the resolvers that dnsCapture captures; * for any (default: those of resolv.conf)",
        _resolvers,
    ),
    Option(
        "hostLoopbackRange",
        "host_loopback_range",
        "CIDR",
        "loopback addresses that are always direct (default: 127.0.0.1/32)",
        _loopback_range,
    ),
    Option(
        "dropInvalid",
        "drop_invalid",
        "BOOL",
        "packets that conntrack finds invalid are dropped (default: false; iptables mode only)",
        _switch,
    ),
    Option(
        "outboundPort",
        "outbound_port",
        "PORT",
        "the sidecar's outbound listener (default: 15001)",
        _port,
    ),
    Option(
        "inboundPort",
        "inbound_port",
        "PORT",
        "the sidecar's inbound listener (default: 15006)",
        _port,
    ),
    Option("dnsPort", "dns_port", "PORT", "the sidecar's DNS listener (default: 15053)", _port),
)
