"""Lists too long for a rule each, as sets that one rule asks (ipset(8)). Pure.

A set's name tells what is in it, so a changed list is another set: rules go from one to the other
in one transaction. What a lookup costs grows with how many prefix lengths a list has, not with its
entries (ip_set_hash_net).
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network

from redirector.model import IPNetwork

#: A list that takes more rules than this becomes a set; for shorter ones ipset need not be there.
MOST_RULES = 32
#: All our sets are named so; a namespace's sets belong to it alone (net/netfilter/ipset).
PREFIX = "redirector-"
#: What is being filled; it takes its name when it is whole.
STAGING = f"{PREFIX}staging"
#: With prefix and label this makes at most 31 letters (IPSET_MAXNAMELEN).
_HASH_LENGTH = 12
_BITS = {4: 32, 6: 128}


@dataclass(frozen=True)
class IpSet:
    """A set as it should be: `kind` with its parameters, members as ipset prints them."""

    name: str
    kind: str
    members: frozenset[str]

    @property
    def match(self) -> str:
        """What a rule says to ask for the packet's destination."""
        return f"-m set --match-set {self.name} dst"

    def holds(self, found: Collection[str]) -> bool:
        """Whether these members, as ipset prints them, are the set's."""
        present = frozenset(found)
        return present == self.members or _as_written(present - self.members) == _as_written(
            self.members - present
        )


def networks_set(version: int, networks: Iterable[IPNetwork]) -> IpSet:
    """Return the set of networks of one family; one that is a whole family fits no set."""
    members = frozenset(str(net).removesuffix(f"/{_BITS[version]}") for net in networks)
    family = "inet" if version == 4 else "inet6"
    kind = f"hash:net family {family} maxelem {len(members)}"
    return _named(f"nets{version}", kind, members)


def ports_set(ports: Iterable[int]) -> IpSet:
    """Return the set of ports, of TCP and UDP alike."""
    return _named("ports", "bitmap:port range 0-65535", frozenset(map(str, ports)))


def _named(label: str, kind: str, members: frozenset[str]) -> IpSet:
    content = "\n".join((kind, *sorted(members)))
    mark = hashlib.sha256(content.encode()).hexdigest()[:_HASH_LENGTH]
    return IpSet(f"{PREFIX}{label}-{mark}", kind, members)


def parse(saved: str) -> dict[str, frozenset[str]]:
    """Read the names and members of our sets out of what `ipset save` prints."""
    found: dict[str, set[str]] = {}
    for line in saved.splitlines():
        verb, name, *rest = line.split()
        if name.startswith(PREFIX):
            members = found.setdefault(name, set())
            if verb == "add":
                members.add(rest[0])
    return {name: frozenset(members) for name, members in found.items()}


def used_by(lines: Iterable[str]) -> frozenset[str]:
    """Return the names of our sets that rules ask."""
    return frozenset(re.findall(rf"--match-set ({PREFIX}\S+)", "\n".join(lines)))


def creation(wanted: Iterable[IpSet], found: Mapping[str, Collection[str]]) -> str:
    """Return what makes sets, for `ipset restore`; "" when each is there and whole.

    A set appears, or changes, in one step: nobody ever asks a half-filled one.
    """
    text: list[str] = []
    there = set(found)
    for each in wanted:
        if each.name in found and each.holds(found[each.name]):
            continue
        if STAGING in there:
            text.append(f"destroy {STAGING}")
            there.remove(STAGING)
        text.append(f"create {STAGING} {each.kind}")
        text += (f"add {STAGING} {member}" for member in sorted(each.members))
        if each.name in there:
            text += (f"swap {STAGING} {each.name}", f"destroy {STAGING}")
        else:
            text.append(f"rename {STAGING} {each.name}")
            there.add(each.name)
    return "".join(f"{line}\n" for line in text)


def _as_written(members: Iterable[str]) -> frozenset[IPNetwork | str]:
    """One value for each way to write an address: C and Python differ in some of IPv6."""
    return frozenset(ip_network(member) if ":" in member else member for member in members)
