"""By which interface a pod's routes lead where, for a mode that cannot ask each time."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Network, ip_network
from pathlib import Path
from typing import Any

from redirector.errors import InputError
from redirector.model import IPNetwork, Links
from redirector.network import within

_MAIN = 254
#: Priority and table of the rules that every namespace has (fib_default_rules_init,
#: fib6_rules_net_init).
_COMMON_RULES = {(0, 255), (32766, _MAIN), (32767, 253)}
#: What narrows a rule down to some of the traffic (linux/fib_rules.h).
_SELECTORS = (
    "FRA_SRC", "FRA_DST", "FRA_IIFNAME", "FRA_OIFNAME", "FRA_FWMARK", "FRA_UID_RANGE",
    "FRA_IP_PROTO", "FRA_SPORT_RANGE", "FRA_DPORT_RANGE", "FRA_TUN_ID", "FRA_L3MDEV",
)  # fmt: skip
_UNICAST = 1  # RTN_UNICAST
_LINK_LOCAL = IPv6Network("fe80::/10")


@dataclass(frozen=True)
class _Route:
    destination: IPNetwork
    metric: int
    #: Whether it leads through an excluded interface; None: through such and others.
    excluded: bool | None


def links(pod: str, netns: Path, excluded: frozenset[str]) -> Links:
    """Return where the excluded interfaces are and what is routed through them.

    Of the main table: the destinations through excluded interfaces, and those through others,
    whichever of both holds an address by the longest prefix. IPv6 link-local ones are left out,
    because their interface is the caller's choice. InputError when routing depends on more than
    the destination.
    """
    return within(netns, lambda: _links(pod, excluded)) if excluded else Links()


def _links(pod: str, excluded: frozenset[str]) -> Links:
    # Importing it costs more than enrolling a pod.
    from pyroute2 import IPRoute

    best: dict[IPNetwork, _Route] = {}
    with IPRoute() as ipr:
        indexes = {
            int(link["index"])
            for link in ipr.get_links()
            if link.get_attr("IFLA_IFNAME") in excluded
        }
        for family in (socket.AF_INET, socket.AF_INET6):
            _require_common_rules(pod, ipr.get_rules(family=family))
            for route in _routes(ipr.get_routes(family=family, table=_MAIN), indexes):
                before = best.get(route.destination)
                if before is None or route.metric < before.metric:
                    best[route.destination] = route
                elif route.metric == before.metric and route.excluded != before.excluded:
                    best[route.destination] = _Route(route.destination, route.metric, None)
    for route in best.values():
        if route.excluded is None:
            _refuse(pod, f"the route to {route.destination} leads through excluded ones and others")
    return Links(
        excluded=tuple(sorted(indexes)),
        through=tuple(each.destination for each in best.values() if each.excluded),
        beside=tuple(each.destination for each in best.values() if not each.excluded),
    )


def _routes(messages: Any, excluded: set[int]) -> Iterator[_Route]:
    for message in messages:
        if message["type"] != _UNICAST:
            continue
        everywhere = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
        destination = ip_network(
            f"{message.get_attr('RTA_DST') or everywhere}/{message['dst_len']}"
        )
        if isinstance(destination, IPv6Network) and destination.subnet_of(_LINK_LOCAL):
            continue
        hops = message.get_attr("RTA_MULTIPATH") or []
        ways = {hop["oif"] in excluded for hop in hops} or {message.get_attr("RTA_OIF") in excluded}
        # Of a route for some senders or types of service only nobody can tell beforehand.
        narrow = message["src_len"] or message["tos"]
        mixed = len(ways) > 1 or narrow
        metric = message.get_attr("RTA_PRIORITY") or 0
        yield _Route(destination, metric, None if mixed else ways.pop())


def _require_common_rules(pod: str, messages: Any) -> None:
    for message in messages:
        priority = message.get_attr("FRA_PRIORITY") or 0
        table = message.get_attr("FRA_TABLE") or message["table"]
        narrow = message["src_len"] or message["dst_len"] or message["tos"]
        selects = any(message.get_attr(name) for name in _SELECTORS)
        if narrow or selects or (priority, table) not in _COMMON_RULES:
            _refuse(pod, f"there is a routing rule of its own (ip rule, priority {priority})")


def _refuse(pod: str, why: str) -> None:
    raise InputError(
        f"pod {pod}: excludeInterfaces: {why}: eBPF mode cannot tell beforehand by which interface "
        "a connection leaves; use --mode iptables"
    )
