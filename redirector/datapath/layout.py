"""The structs of bpf/sockops/layout.h in Python, and the C that proves they are the same.

Sizes are bytes, in the machine's byte order except where the C says __be32. The loader appends
`static_assertions()` to the source, so a layout that drifts apart does not compile.
"""

import ctypes
import re
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any, NamedTuple

from redirector.model import IPAddress
from redirector.steering import RULES

MAX_PROXY_IDS = 4
CIDR_V6 = 16
LISTENER_SLOTS = 4


def mapped(ip: IPAddress) -> bytes:
    """16 bytes in network order; IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""
    return ip.packed if isinstance(ip, IPv6Address) else b"\0" * 10 + b"\xff\xff" + ip.packed


def unmapped(raw: bytes) -> IPAddress:
    """The inverse of `mapped`."""
    ip = IPv6Address(raw)
    return ip.ipv4_mapped or ip


@lru_cache(4096)
def host(raw: bytes) -> str:
    """The address that `mapped` made so, as it stands before a port."""
    ip = unmapped(raw)
    return str(ip) if isinstance(ip, IPv4Address) else f"[{ip}]"


class Struct(ctypes.Structure):
    """A C struct by name; `bytes(x)` is its memory."""

    c_name: str


class Address(Struct):
    """struct address: an IPv6 or IPv4-mapped address."""

    c_name = "address"
    _fields_ = (("word", ctypes.c_uint32 * 4),)

    @classmethod
    def of(cls, ip: IPAddress) -> "Address":
        """From an address of either family."""
        return cls.from_buffer_copy(mapped(ip))

    def ip(self) -> IPAddress:
        """As an address of the family it stands for."""
        return unmapped(bytes(self))


class Endpoint(Struct):
    """struct endpoint."""

    c_name = "endpoint"
    _fields_ = (("ip", Address), ("port", ctypes.c_uint16), ("pad", ctypes.c_uint16))

    def __str__(self) -> str:
        return f"{host(bytes(self.ip))}:{self.port}"


class FlowKey(Struct):
    """struct flow_key."""

    c_name = "flow_key"
    _fields_ = (
        ("netns", ctypes.c_uint64),
        ("client", Address),
        ("server", Address),
        ("client_port", ctypes.c_uint16),
        ("server_port", ctypes.c_uint16),
        ("pad", ctypes.c_uint32),
    )

    @property
    def ends(self) -> tuple[IPAddress, int, IPAddress, int]:
        """Address and port of the socket that connected, then those of its peer."""
        return self.client.ip(), self.client_port, self.server.ip(), self.server_port


class FlowFlag(IntFlag):
    """enum flow_flag."""

    STEERED = 1
    ANSWERED = 2
    ACCELERATE = 4
    WATCHED = 8
    LEFT = 16
    AGAIN = 32


class Process(Struct):
    """struct process: who called connect(); all zero when it is not known."""

    c_name = "process"
    _fields_ = (("pid", ctypes.c_uint32), ("comm", ctypes.c_char * 16))


class Flow(Struct):
    """struct flow."""

    c_name = "flow"
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("original", Endpoint),
        ("flags", ctypes.c_uint32),
        ("client_netns", ctypes.c_uint64),
        ("opened_ns", ctypes.c_uint64),
        ("unread", ctypes.c_uint32 * 2),
        ("bytes", ctypes.c_uint64 * 2),
        ("messages", ctypes.c_uint64 * 2),
        ("drained", ctypes.c_uint64 * 2),
        ("verdict", ctypes.c_uint64 * 2),
        ("socket", ctypes.c_uint64 * 2),
        ("process", Process),
        ("rule", ctypes.c_uint32),
        ("passed", ctypes.c_uint32),
        ("server_rule", ctypes.c_uint32),
        ("server_netns", ctypes.c_uint64),
    )


class FlowName(Struct):
    """struct flow_name: one connection's flow."""

    c_name = "flow_name"
    _fields_ = (("key", FlowKey), ("id", ctypes.c_uint64))


class Room(IntEnum):
    """enum room: index in the map of that name."""

    TAKEN = 0
    FLOOR = 1


class Side(IntEnum):
    """enum side."""

    CLIENT = 0
    SERVER = 1


class SockState(Struct):
    """struct sock_state."""

    c_name = "sock_state"
    _fields_ = (
        ("flow", FlowKey),
        ("id", ctypes.c_uint64),
        ("peer", ctypes.c_uint64),
        ("original", Endpoint),
        ("side", ctypes.c_uint32),
        ("verdict", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("leaving_ns", ctypes.c_uint64),
        ("leaving_acked", ctypes.c_uint64),
        ("opened_ns", ctypes.c_uint64),
        ("process", Process),
        ("rule", ctypes.c_uint32),
        ("connect_us", ctypes.c_uint32),
        ("passed", ctypes.c_uint32),
        ("habit", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class Defect(IntFlag):
    """enum defect: what the running kernel does wrong with redirected bytes."""

    FIONREAD = 1
    UNREAD = 2
    REDIRECT = 4
    ORDER = 8
    FIONREAD_PASSED = 16
    HALF_CLOSE = 32
    CLOSE = 64
    STALLED = 128
    EPOLL = 256
    PEEK = 512
    SENDFILE = 1024
    SPLICE_IN = 2048
    SPLICE_OUT = 4096
    ZEROCOPY = 8192
    SEAM = 16384
    OVERLAP = 32768


#: Makes the loader only try the kernel, and print the defects as a number.
SELF_TEST = "--self-test"


class About(Struct):
    """struct about: the one entry of the map of that name."""

    c_name = "about"
    _fields_ = (
        ("sha256", ctypes.c_uint8 * 32),
        ("defects", ctypes.c_uint32),
        ("flow_key_netns", ctypes.c_uint16),
        ("flow_key_server", ctypes.c_uint16),
        ("flow_client_netns", ctypes.c_uint16),
        ("flow_flags", ctypes.c_uint16),
        ("flow_id", ctypes.c_uint16),
        ("pad", ctypes.c_uint16),
    )


class PodFlag(IntFlag):
    """enum pod_flag."""

    ACCELERATE = 1
    INCLUDE_ALL_V4 = 2
    INCLUDE_ALL_V6 = 4
    HAS_CIDRS = 8
    HAS_PORTS = 16
    INBOUND_LIST = 32
    GROUP_LIST = 64
    GROUP_EXCLUDED = 128
    DNS = 256
    DNS_ANY = 512
    INTERFACES = 1024
    REPEATED = 2048
    TAKEOVER = 1 << 16


class PodEntry(Struct):
    """struct pod."""

    c_name = "pod"
    _fields_ = (
        ("ip4", Address),
        ("ip6", Address),
        ("proxy_uid", ctypes.c_uint32 * MAX_PROXY_IDS),
        ("proxy_gid", ctypes.c_uint32 * MAX_PROXY_IDS),
        ("proxy_uids", ctypes.c_uint32),
        ("proxy_gids", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("host_loopback", ctypes.c_uint32),
        ("host_loopback_mask", ctypes.c_uint32),
        ("outbound_port", ctypes.c_uint16),
        ("inbound_port", ctypes.c_uint16),
        ("dns_port", ctypes.c_uint16),
        ("pad", ctypes.c_uint16),
    )


class ListenerKey(Struct):
    """struct listener_key."""

    c_name = "listener_key"
    _fields_ = (
        ("netns", ctypes.c_uint64),
        ("family", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
    )


class CidrSet(IntEnum):
    """enum cidr_set."""

    INCLUDE = 0
    EXCLUDE = 1
    RESOLVER = 2
    ROUTE = 3
    OWN = 4


class CidrValue(IntEnum):
    """enum cidr_value."""

    LISTED = 1
    IN_LOOPBACK = 2
    BY_EXCLUDED = 3


class CidrKey(Struct):
    """struct cidr_key: an LPM trie key; 96 bits before the address always match whole."""

    c_name = "cidr_key"
    _fields_ = (
        ("prefixlen", ctypes.c_uint32),
        ("netns_low", ctypes.c_uint32),
        ("netns_high", ctypes.c_uint32),
        ("set", ctypes.c_uint32),
        ("ip", Address),
    )


class MemberSet(IntEnum):
    """enum member_set."""

    OUTBOUND_PORT_INCLUDE = 0
    OUTBOUND_PORT_EXCLUDE = 1
    INBOUND_PORT_INCLUDE = 2
    INBOUND_PORT_EXCLUDE = 3
    GROUP_INCLUDE = 4
    GROUP_EXCLUDE = 5
    INTERFACE_EXCLUDE = 6


class MemberKey(Struct):
    """struct member_key."""

    c_name = "member_key"
    _fields_ = (
        ("netns", ctypes.c_uint64),
        ("value", ctypes.c_uint32),
        ("set", ctypes.c_uint32),
    )


class Counter(IntEnum):
    """enum counter."""

    STEERED_OUTBOUND = 0
    STEERED_INBOUND = 1
    STEERED_SELF = 2
    STEERED_DNS = 3
    ACCELERATED = 4
    REDIRECTED_BYTES = 5
    REDIRECTED_MESSAGES = 6
    PASSED_NO_PEER = 7
    PASSED_UNREAD = 8
    PASSED_MEMORY = 9
    PASSED_LEFT = 10
    PASSED_FAST_OPEN = 11
    PASSED_FULL = 12
    PASSED_NO_SHARE = 13
    PASSED_UNSUPPORTED = 14
    PASSED_ZEROCOPY = 15
    PASSED_BRIEF = 16
    WITHHELD_KTLS = 17
    WITHHELD_ZEROCOPY = 18
    REFUSED_NO_STATE = 19
    REFUSED_NO_FLOW = 20
    REFUSED_NO_SHARE = 21
    REFUSED_NO_LISTENER = 22


class ConnectKind(IntEnum):
    """enum connect_kind."""

    STEERED = 0
    DIRECT = 1


CONNECT_BUCKETS = 26


class Latency(Struct):
    """struct latency: bucket b counts up to 2^b µs, the last one all that took longer."""

    c_name = "latency"
    _fields_ = (("bucket", ctypes.c_uint64 * CONNECT_BUCKETS), ("total_us", ctypes.c_uint64))


class Counters(Struct):
    """struct counters, one for each possible CPU."""

    c_name = "counters"
    _fields_ = (
        ("value", ctypes.c_uint64 * len(Counter)),
        ("rule", ctypes.c_uint64 * len(RULES)),
        ("connect", Latency * len(ConnectKind)),
    )


class EventKind(IntEnum):
    """enum event_kind."""

    OPEN = 1
    CLOSE = 2
    FAILED = 3
    REFUSED = 4


class Event(Struct):
    """struct event: what a follower reads from its ring buffer."""

    c_name = "event"
    _fields_ = (
        ("at_ns", ctypes.c_uint64),
        ("opened_ns", ctypes.c_uint64),
        ("id", ctypes.c_uint64),
        ("netns", ctypes.c_uint64),
        ("sent", ctypes.c_uint64),
        ("received", ctypes.c_uint64),
        ("redirected", ctypes.c_uint64),
        ("client", Endpoint),
        ("server", Endpoint),
        ("process", Process),
        ("connect_us", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("rule", ctypes.c_uint16),
        ("kind", ctypes.c_uint8),
        ("reason", ctypes.c_uint8),
        ("sides", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class EventRecord(NamedTuple):
    """The members of struct event, those of its endpoints and its process one by one."""

    at_ns: int
    opened_ns: int
    id: int
    netns: int
    sent: int
    received: int
    redirected: int
    #: 16 bytes, as `mapped` makes them.
    client: bytes
    client_port: int
    server: bytes
    server_port: int
    pid: int
    #: 16 bytes, with a NUL behind it.
    comm: bytes
    connect_us: int
    flags: int
    rule: int
    kind: int
    reason: int
    sides: int


def packed(kind: type[Any]) -> str:
    """The members of a struct as the `struct` module has them, padding without a value."""
    if issubclass(kind, Address):
        return f"{ctypes.sizeof(kind)}s"
    if issubclass(kind, Struct):
        return "".join(
            f"{ctypes.sizeof(field[1])}x" if field[0] == "pad" else packed(field[1])
            for field in kind._fields_
        )
    if issubclass(kind, ctypes.Array):
        return f"{ctypes.sizeof(kind)}s"
    return {8: "Q", 4: "I", 2: "H", 1: "B"}[ctypes.sizeof(kind)]


MAX_FOLLOWERS = 8


STRUCTS: tuple[type[Struct], ...] = (
    Address,
    Endpoint,
    FlowKey,
    Flow,
    FlowName,
    SockState,
    About,
    PodEntry,
    ListenerKey,
    CidrKey,
    MemberKey,
    Process,
    Latency,
    Counters,
    Event,
)

ENUMS: tuple[tuple[str, type[IntEnum] | type[IntFlag]], ...] = (
    ("", Side),
    ("ROOM_", Room),
    ("FLOW_", FlowFlag),
    ("DEFECT_", Defect),
    ("POD_", PodFlag),
    ("CIDR_", CidrSet),
    ("CIDR_", CidrValue),
    ("", MemberSet),
    ("", Counter),
    ("CONNECT_", ConnectKind),
    ("EVENT_", EventKind),
)


def static_assertions() -> Iterator[str]:
    """C lines that fail to compile where a size, an offset or a constant differs from Python's."""
    for struct in STRUCTS:
        name = f"struct {struct.c_name}"
        yield f'_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "size of {name}");'
        for field in struct._fields_:
            offset = getattr(struct, field[0]).offset
            yield (
                f"_Static_assert(__builtin_offsetof({name}, {field[0]}) == {offset}, "
                f'"offset of {name}.{field[0]}");'
            )
    for prefix, enum in ENUMS:
        for member in enum:
            constant = f"{prefix}{member.name}"
            yield f'_Static_assert({constant} == {member.value}, "value of {constant}");'
    for index, rule in enumerate(RULES):
        constant = f"RULE_{re.sub('[.-]', '_', rule.name).upper()}"
        yield f'_Static_assert({constant} == {index}, "value of {constant}");'
    yield f'_Static_assert(CIDR_V6 == {CIDR_V6}, "family of a set of ranges");'
    yield f'_Static_assert(RULES == {len(RULES)}, "number of rules");'
    yield f'_Static_assert(LISTENER_SLOTS == {LISTENER_SLOTS}, "number of listeners");'
    yield f'_Static_assert(ROOMS == {len(Room)}, "counts of the flows map");'
    yield f'_Static_assert(COUNTERS == {len(Counter)}, "number of counters");'
    yield f'_Static_assert(CONNECT_BUCKETS == {CONNECT_BUCKETS}, "buckets of latency");'
    yield f'_Static_assert(MAX_FOLLOWERS == {MAX_FOLLOWERS}, "slots of followers");'
