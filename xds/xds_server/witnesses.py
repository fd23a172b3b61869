"""Whose word counts when a client refuses something: objects' statuses depend on it. Pure.

Without a certificate anybody who reaches the server's address may say to be any pod.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import ip_address
from urllib.parse import unquote

from redirector.model import IPAddress
from redirector.steering import unmapped
from xds_server.identity import Peer
from xds_server.ir import Name, NodeId, Workload
from xds_server.quarantine import Quarantined
from xds_server.stream import Stream


class Trust(IntEnum):
    """How far a client is known to be the pod that it names."""

    #: It comes over the network from an address that is not that pod's.
    NONE = 0
    #: It reached a socket of the server's own machine and says so; nothing speaks against it.
    WORD = 1
    #: Its certificate, or the address that it comes from, is the pod's.
    PROVEN = 2


@dataclass(frozen=True)
class Witness:
    """A connected client."""

    node: NodeId
    trust: Trust
    stream: Stream


def trust(
    workloads: Mapping[Name, Workload], node: NodeId, peer: Peer | None, address: str
) -> Trust:
    """Of a client from `address`, which is as gRPC tells it: `ipv4:10.0.0.1:4711`, `unix:`.

    Certificates have been judged already, see `permit`.
    """
    if peer is not None:
        return Trust.PROVEN
    source = _ip(address)
    if source is None or source.is_loopback:
        return Trust.WORD
    workload = workloads.get(Name(node.namespace, node.pod))
    known = workload is not None and source in workload.addresses
    return Trust.PROVEN if known else Trust.NONE


def _ip(address: str) -> IPAddress | None:
    kind, _, rest = unquote(address).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    return unmapped(ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0]))


def credible(witnesses: Iterable[Witness]) -> Iterator[tuple[NodeId, Quarantined]]:
    """What clients refuse, as far as it may be believed: of those that say to be one pod, the best
    known; and nothing that another one of these has taken."""
    claimants: defaultdict[tuple[Name, str], list[Witness]] = defaultdict(list)
    for witness in witnesses:
        node = witness.node
        claimants[Name(node.namespace, node.pod), node.client].append(witness)
    for claiming in claimants.values():
        best = max(witness.trust for witness in claiming)
        heard = [witness for witness in claiming if witness.trust is best is not Trust.NONE]
        for witness in heard:
            for what in witness.stream.quarantined:
                if not any(other.stream.took(what) for other in heard):
                    yield witness.node, what
