"""Traffic is told apart by its destination, and a peer by its source: an address has one owner."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from redirector.model import IPAddress
from xds_server.ingest.core import Pod, RawService
from xds_server.ingest.reader import Field, Item
from xds_server.ir import Name


@dataclass(frozen=True)
class Contested:
    """Addresses that two pods claim, each of which a peer there could be; and what services lost to
    an older object."""

    pods: frozenset[IPAddress]
    services: Mapping[Name, frozenset[IPAddress]]


def contested(pods: Iterable[tuple[Item, Pod]], services: Iterable[RawService]) -> Contested:
    """Reports every address that has two owners; the oldest object keeps it."""
    claims: list[tuple[Item, Field, IPAddress]] = []
    for item, pod in pods:
        for address in () if pod.host_network else pod.addresses:
            claims.append((item, item.root["status"]["podIP"], address))
    for service in services:
        for address in service.addresses:
            claims.append((service.item, service.item.spec["clusterIP"], address))
    owners: dict[IPAddress, Item] = {}
    shared: set[IPAddress] = set()
    lost: dict[Name, set[IPAddress]] = defaultdict(set)
    for item, field, address in sorted(claims, key=lambda claim: claim[0].age):
        owner = owners.setdefault(address, item)
        if owner is item:
            continue
        field.misfit(f"{owner.subject} has {address}, too; give each its own address")
        if item.kind == "Service":
            lost[item.name].add(address)
        else:
            shared.add(address)
    return Contested(
        frozenset(shared), {name: frozenset(addresses) for name, addresses in lost.items()}
    )
