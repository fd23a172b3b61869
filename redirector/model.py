"""The values that every room of the node side shares. Pure: no I/O, nothing imported but types."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

#: What our annotations of pods and namespaces begin with, and those that the control plane reads.
ANNOTATION = "redirector.io/"
IMPORTS, OUTBOUND_POLICY = "imports", "outboundPolicy"


class Mode(StrEnum):
    """How a pod's traffic reaches its sidecar."""

    EBPF = "ebpf"
    IPTABLES = "iptables"


class Accelerate(StrEnum):
    """Whether steered connections are short-circuited socket to socket (eBPF mode only)."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"

    def holds(self, *, defects: bool) -> bool:
        """Whether they are, on a kernel that does something wrong with redirected bytes or not."""
        return not defects if self is Accelerate.AUTO else self is Accelerate.ON


EVERYWHERE: tuple[IPNetwork, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))
LOCALHOST_V4 = IPv4Network("127.0.0.1/32")


@dataclass(frozen=True)
class Steering:
    """Which of a pod's connections go to its sidecar; names and defaults follow Istio's.

    Where None is allowed it stands for all of them, as `*` does in the options.
    """

    proxy_uids: tuple[int, ...] = (1337,)
    proxy_gids: tuple[int, ...] = (1337,)
    outbound_port: int = 15001
    inbound_port: int = 15006
    dns_port: int = 15053
    include_outbound_cidrs: tuple[IPNetwork, ...] = EVERYWHERE
    exclude_outbound_cidrs: tuple[IPNetwork, ...] = ()
    include_outbound_ports: frozenset[int] = frozenset()
    exclude_outbound_ports: frozenset[int] = frozenset()
    #: None captures every inbound port but the excluded ones; a set captures just those.
    include_inbound_ports: frozenset[int] | None = None
    exclude_inbound_ports: frozenset[int] = frozenset({15020, 15021, 15090})
    #: By name; nothing that comes or goes through these is captured.
    exclude_interfaces: frozenset[str] = frozenset()
    #: By name; virtual machines behind these are treated as processes of the pod.
    kubevirt_interfaces: frozenset[str] = frozenset()
    #: By effective group id, for outbound and DNS.
    include_owner_groups: frozenset[int] | None = None
    exclude_owner_groups: frozenset[int] = frozenset()
    dns_capture: bool = False
    #: Whose port 53 is captured; with none of them nothing is, None: anybody's.
    dns_servers: tuple[IPAddress, ...] | None = ()
    #: What counts as the host itself beside ::1, inside 127.0.0.0/8.
    host_loopback_range: IPv4Network = LOCALHOST_V4
    #: Drop what conntrack cannot place, such as a stray SYN-ACK, that would be answered by a reset.
    drop_invalid: bool = False


@dataclass(frozen=True)
class Links:
    """Where the excluded interfaces of a pod are, as its namespace was found."""

    #: Their indexes.
    excluded: tuple[int, ...] = ()
    #: What is routed through them, and what is not; the longest prefix says which.
    through: tuple[IPNetwork, ...] = ()
    beside: tuple[IPNetwork, ...] = ()


#: First id of the pod, first id of the kernel's, how many (user_namespaces(7)).
IdRange = tuple[int, int, int]
#: What no process has.
NO_ID = 2**32 - 1


@dataclass(frozen=True)
class Ids:
    """Which ids of the kernel's a pod's users and groups are; without ranges, the same."""

    users: tuple[IdRange, ...] = ()
    groups: tuple[IdRange, ...] = ()

    def user(self, uid: int) -> int:
        """The kernel's id of a user of the pod; NO_ID when it has none."""
        return _mapped(self.users, uid)

    def group(self, gid: int) -> int:
        """Likewise of a group."""
        return _mapped(self.groups, gid)


def _mapped(ranges: tuple[IdRange, ...], number: int) -> int:
    if not ranges:
        return number
    return next(
        (outside + number - inside for inside, outside, n in ranges if 0 <= number - inside < n),
        NO_ID,
    )


def without_links(addresses: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
    """Those that need no link beside them to be reached, as IPv6 link-local ones do."""
    return tuple(ip for ip in addresses if ip.version == 4 or not ip.is_link_local)


@dataclass(frozen=True)
class Pod:
    """One enrolled pod, as `redirector enroll` was told of it.

    `cgroup` is an absolute path in the cgroup2 mount; application and sidecar run in it or below.
    `addresses` are those of the pod's own interfaces, loopback left out; the one that it is known
    by is the first, link-local ones are the last.
    """

    name: str
    netns: Path
    cgroup: Path
    mode: Mode
    accelerate: Accelerate = Accelerate.AUTO
    steering: Steering = field(default_factory=Steering)
    addresses: tuple[IPAddress, ...] = ()
    #: Known where a mode needs it.
    links: Links = Links()
    #: SO_NETNS_COOKIE of `netns`; still known when the namespace is gone.
    netns_cookie: int = 0
    #: The UID by which the kubelet knows it, when the agent enrolled it; empty: by hand.
    uid: str = ""
    #: Known where a mode needs it.
    ids: Ids = Ids()
    #: In eBPF mode, those of the addresses that another pod in that mode had first.
    repeated: tuple[IPAddress, ...] = ()

    @property
    def node_wide(self) -> tuple[IPAddress, ...]:
        """Those of the addresses that mean the same on all of the node: not link-local."""
        return tuple(ip for ip in self.addresses if not ip.is_link_local)

    @property
    def unique(self) -> tuple[IPAddress, ...]:
        """Those by which this pod alone is known."""
        return tuple(ip for ip in self.node_wide if ip not in self.repeated)

    @property
    def aims(self) -> tuple[IPAddress, ...]:
        """Where its connections to the sidecar go: of each family the first that needs no link."""
        first = {ip.version: ip for ip in reversed(without_links(self.addresses))}
        return tuple(first[version] for version in sorted(first))

    @property
    def of_links(self) -> tuple[IPAddress, ...]:
        """The link-local addresses."""
        return tuple(ip for ip in self.addresses if ip.is_link_local)
