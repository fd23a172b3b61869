"""The kernel's tables and what of ours can be in them. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from redirector.modes.iptables.sets import IpSet

OUTPUT_CHAIN = "REDIRECTOR_OUTPUT"
INBOUND_CHAIN = "REDIRECTOR_INBOUND"
#: Keeps what the sidecar's DNS listener is asked apart from what the sidecar asks itself.
DNS_CHAIN = "REDIRECTOR_DNS"
DROP_CHAIN = "REDIRECTOR_DROP"
#: What `remove` leaves while redirected connections are open; nothing jumps to it.
KEEP_CHAIN = "REDIRECTOR_KEEP"


class Table(StrEnum):
    """The tables that may hold rules of ours, in the order that a packet meets them."""

    RAW = "raw"
    MANGLE = "mangle"
    NAT = "nat"


#: Our chains while a pod is steered, and whose they are.
CHAINS = {
    DNS_CHAIN: Table.RAW,
    DROP_CHAIN: Table.MANGLE,
    OUTPUT_CHAIN: Table.NAT,
    INBOUND_CHAIN: Table.NAT,
}
#: Every chain that is ours.
OWN_CHAINS = {**CHAINS, KEEP_CHAIN: Table.NAT}


@dataclass(frozen=True)
class Family:
    """What differs between IPv4 and IPv6."""

    version: int
    restore: str
    save: str
    passthrough: str
    everywhere: str


IPV4 = Family(4, "iptables-restore", "iptables-save", "127.0.0.6/32", "0.0.0.0/0")
IPV6 = Family(6, "ip6tables-restore", "ip6tables-save", "::6/128", "::/0")


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
        match = f" {self.match}" if self.match else ""
        return f"-A {self.chain}{match} -m comment --comment {self.name} -j {self.target}"


@dataclass(frozen=True)
class Jump:
    """What sends packets from a base chain to a chain of ours, of the same table."""

    base: str
    match: str
    chain: str
