"""Typed access to the pinned maps: what the programs are told of a pod, and what they tell."""

import contextlib
import ctypes
import errno
import socket
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.forgetting import forgetting
from redirector.datapath.layout import (
    CIDR_V6,
    LISTENER_SLOTS,
    About,
    Address,
    CidrSet,
    CidrValue,
    ConnectKind,
    Counter,
    Counters,
    Flow,
    FlowKey,
    ListenerKey,
    MemberKey,
    MemberSet,
    PodEntry,
    Room,
    mapped,
)
from redirector.errors import DatapathError
from redirector.model import IPAddress, IPNetwork, Links
from redirector.steering import RULES


@dataclass(frozen=True)
class OpenFlow:
    """One open connection as the kernel keeps it."""

    key: FlowKey
    flow: Flow


#: A hash map says the one, an LPM trie the other.
_FULL = (errno.E2BIG, errno.ENOSPC)
#: Their values are sockets, which the kernel does not show in batches.
_SOCKHASHES = frozenset({"listeners", "sockets"})
#: The maps that pods and connections fill.
_FILLING = _SOCKHASHES | {"arrived", "cidrs", "flows", "members", "pods", "pods_by_address"}
# What `moved` wants of a struct flow.
_MOVED = struct.Struct(
    f"={Flow.client_netns.offset}xQ{Flow.bytes.offset - Flow.client_netns.offset - 8}x2Q"
    f"{Flow.messages.offset - Flow.bytes.offset - 16}x2Q"
    f"{ctypes.sizeof(Flow) - Flow.messages.offset - 16}x"
)
#: netns cookie -> bytes and messages redirected.
Moved = dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Lists:
    """What the maps hold of a pod beside its entry, under keys of its own."""

    addresses: Collection[IPAddress] = ()
    cidrs: Mapping[CidrSet, Collection[IPNetwork]] = field(default_factory=dict)
    members: Mapping[MemberSet, Collection[int]] = field(default_factory=dict)
    links: Links = field(default_factory=Links)


@dataclass(frozen=True)
class Counted:
    """A pod's counters at one moment, one for each CPU; none when the pod has none."""

    cpus: tuple[Counters, ...]

    def counters(self, moved: tuple[int, int] = (0, 0)) -> dict[Counter, int]:
        """All CPUs together, with the bytes and messages that open flows have `moved`."""
        totals = {counter: sum(cpu.value[counter] for cpu in self.cpus) for counter in Counter}
        totals[Counter.REDIRECTED_BYTES] += moved[0]
        totals[Counter.REDIRECTED_MESSAGES] += moved[1]
        return totals

    def rules(self) -> dict[str, int]:
        """How many of a pod's connections each rule of `steering.RULES` decided, by its name."""
        return {
            rule.name: sum(cpu.rule[index] for cpu in self.cpus) for index, rule in enumerate(RULES)
        }

    def latencies(self) -> dict[ConnectKind, tuple[tuple[int, ...], int]]:
        """How long a pod's connections took to be established: struct latency's buckets, and µs."""
        return {
            kind: (
                tuple(map(sum, zip(*(cpu.connect[kind].bucket for cpu in self.cpus), strict=True))),
                sum(cpu.connect[kind].total_us for cpu in self.cpus),
            )
            for kind in ConnectKind
            if self.cpus
        }


class Maps:
    """The maps pinned in one directory of a bpffs.

    Every method may raise DatapathError, which names the map and what the kernel refused.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def _map(self, name: str) -> Iterator[int]:
        try:
            with libbpf.opened(self._directory / name) as fd:
                yield fd
        except OSError as error:
            raise DatapathError(f"map {name}: {self._what_is_wrong(name, error)}") from error

    def _what_is_wrong(self, name: str, error: OSError) -> str:
        pin = self._directory / name
        if error.errno == errno.ENOENT and not pin.exists():
            return f"its pin {pin} is gone; put it back: redirector takeover"
        full = "; the map is full" if error.errno in _FULL else ""
        return f"{error.strerror or error}{full}"

    def about(self) -> About:
        """What is said of the datapath as a whole, by whatever version."""
        with self._map("about") as fd:
            raw = libbpf.map_lookup(fd, bytes(4), libbpf.map_info(fd).value_size)
        size = ctypes.sizeof(About)
        return About.from_buffer_copy((raw or b"").ljust(size, b"\0"))

    def put_pod(self, netns: int, entry: PodEntry) -> None:
        """Publish a pod's steering; from here on the programs act on its namespace."""
        cpus = libbpf.possible_cpus()
        with self._map("counters") as fd:
            if libbpf.map_lookup(fd, _key(netns), ctypes.sizeof(Counters) * cpus) is None:
                libbpf.map_update(fd, _key(netns), bytes(ctypes.sizeof(Counters) * cpus))
        with self._map("shares") as fd:
            libbpf.map_add(fd, _key(netns), bytes(8))
        with self._map("pods") as fd:
            if libbpf.map_lookup(fd, _key(netns), ctypes.sizeof(PodEntry)) is None:
                self._put_floor(_count(fd) + 1)
            libbpf.map_update(fd, _key(netns), bytes(entry))

    def delete_pod(self, netns: int) -> None:
        """Forget the pod's steering, listeners, counters and open flows; its lists have `drop`."""
        for name in ("pods", "counters"):
            with self._map(name) as fd:
                libbpf.map_delete(fd, _key(netns))
        with self._map("listeners") as fd:
            for family in (socket.AF_INET, socket.AF_INET6):
                for key in _listener_keys(netns, family):
                    libbpf.map_delete(fd, key)
        found = self.flows_of(netns)
        with self._map("flows") as fd, forgetting(self._directory.parent, fd) as forget:
            for opened in found:
                forget(bytes(opened.key), _key(opened.flow.id))
        with self._map("shares") as fd:
            libbpf.map_delete(fd, _key(netns))
        with self._map("pods") as fd:
            self._put_floor(_count(fd))

    def _put_floor(self, pods: int) -> None:
        """What room.h guarantees each pod."""
        with self._map("flows") as fd:
            common = libbpf.map_info(fd).max_entries // 2
        with self._map("room") as fd:
            libbpf.map_update(fd, _room_key(Room.FLOOR), _key(common // max(pods, 1)))

    # What a pod had is told by who calls: to look for it would cost with every pod of the node.

    def add(self, netns: int, lists: Lists) -> None:
        """Put these lists beside what the pod has. DatapathError: a part may be there then."""
        for name, entries in _entries(netns, lists).items():
            with self._map(name) as fd:
                libbpf.map_update_many(fd, entries)

    def drop(self, netns: int, had: Iterable[Lists], keep: Iterable[Lists] = ()) -> None:
        """Take off what the pod had, but nothing that is in `keep`."""
        stale = _keys(netns, had)
        for name, kept in _keys(netns, keep).items():
            stale[name] -= kept
        for name, keys in stale.items():
            with self._map(name) as fd:
                if name == "pods_by_address":
                    # Another pod may have taken it over.
                    keys = {key for key in keys if libbpf.map_lookup(fd, key, 8) == _key(netns)}
                libbpf.map_delete_many(fd, keys)

    def drop_all(self, netns: int) -> None:
        """Take off every list of a pod whose lists nobody knows any more."""
        for name, offset in (("cidrs", 4), ("members", MemberKey.netns.offset)):
            with self._map(name) as fd:
                keys = list(libbpf.map_keys(fd, libbpf.map_info(fd).key_size))
                mine = {key for key in keys if key[offset : offset + 8] == _key(netns)}
                libbpf.map_delete_many(fd, mine)
        with self._map("pods_by_address") as fd:
            keys = list(libbpf.map_keys(fd, libbpf.map_info(fd).key_size))
            mine = {key for key in keys if libbpf.map_lookup(fd, key, 8) == _key(netns)}
            libbpf.map_delete_many(fd, mine)

    def put_listener(self, netns: int, family: int, listener: int) -> None:
        """Make a listening socket's descriptor one of the pod's inbound listeners of its family.

        Where there are as many already as may stand for each other, it is left out.
        """
        with self._map("listeners") as fd:
            for key in _listener_keys(netns, family):
                if libbpf.map_add(fd, key, listener.to_bytes(4, "little")):
                    return

    def pod(self, netns: int) -> PodEntry | None:
        """How the programs act on this namespace; None when they do not."""
        with self._map("pods") as fd:
            raw = libbpf.map_lookup(fd, _key(netns), ctypes.sizeof(PodEntry))
        return None if raw is None else PodEntry.from_buffer_copy(raw)

    def counters(self, netns: int) -> dict[Counter, int]:
        """A pod's counters, the open flows' redirected bytes included: a pass over all flows."""
        return self.counted(netns).counters(self.moved().get(netns, (0, 0)))

    def counted(self, netns: int) -> Counted:
        """What the programs have counted of a pod, read once."""
        size = ctypes.sizeof(Counters)
        with self._map("counters") as fd:
            raw = libbpf.map_lookup(fd, _key(netns), size * libbpf.possible_cpus()) or b""
        starts = range(0, len(raw), size)
        return Counted(tuple(Counters.from_buffer_copy(raw, start) for start in starts))

    def moved(self) -> Moved:
        """What the open flows have redirected, in one pass over them all."""
        found: Moved = {}
        for _, values in self._flow_batches():
            for netns, there, back, sent, returned in _MOVED.iter_unpack(values):
                if sent or returned:
                    size, messages = found.get(netns, (0, 0))
                    found[netns] = (size + there + back, messages + sent + returned)
        return found

    def flows(self) -> list[OpenFlow]:
        """The open connections that pods' processes opened and that are steered or accelerated."""
        return [
            _open_flow(keys, values, number)
            for keys, values in self._flow_batches()
            for number in range(len(values) // ctypes.sizeof(Flow))
        ]

    def flows_of(self, netns: int) -> list[OpenFlow]:
        """Those that one pod's processes opened, or that stay within its namespace."""
        found: list[OpenFlow] = []
        pattern = _key(netns)
        for keys, values in self._flow_batches():
            numbers = {
                *_places(keys, pattern, ctypes.sizeof(FlowKey), FlowKey.netns.offset),
                *_places(values, pattern, ctypes.sizeof(Flow), Flow.client_netns.offset),
            }
            found += (_open_flow(keys, values, number) for number in sorted(numbers))
        return found

    def opened_before(self, moment_ns: int) -> dict[int, list[tuple[bytes, int]]]:
        """By the pod that opened them, key and id of the flows older than this (CLOCK_MONOTONIC).

        Bytes, because there may be as many as the map has room for.
        """
        found: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
        key_size, size = ctypes.sizeof(FlowKey), ctypes.sizeof(Flow)
        for keys, values in self._flow_batches():
            for number in range(len(values) // size):
                flow = Flow.from_buffer_copy(values, number * size)
                if flow.opened_ns < moment_ns:
                    key = keys[number * key_size : (number + 1) * key_size]
                    found[flow.client_netns].append((key, flow.id))
        return found

    def forget_flow(self, key: bytes, flow_id: int) -> bool:
        """Delete a flow, unless another connection has its tuple by now."""
        with self._map("flows") as fd, forgetting(self._directory.parent, fd) as forget:
            return forget(key, _key(flow_id))

    def _flow_batches(self) -> Iterator[tuple[bytes, bytes]]:
        with self._map("flows") as fd:
            yield from libbpf.map_entries(fd, ctypes.sizeof(FlowKey), ctypes.sizeof(Flow))

    def shares(self) -> dict[int, int]:
        """netns cookie -> how many flows that pod has, as the programs count them."""
        with self._map("shares") as fd:
            batches = list(libbpf.map_entries(fd, 8, 8))
        netns = struct.iter_unpack("=Q", b"".join(keys for keys, _ in batches))
        flows = struct.iter_unpack("=q", b"".join(values for _, values in batches))
        return {cookie: count for (cookie,), (count,) in zip(netns, flows, strict=True)}

    def room(self, which: Room) -> int:
        """One of the counts of the flows map."""
        with self._map("room") as fd:
            raw = libbpf.map_lookup(fd, _room_key(which), 8)
        return int.from_bytes(raw or b"", "little", signed=True)

    def fills(self) -> dict[str, tuple[int, int]]:
        """By name of a map: how many entries it holds, and how many it has room for."""
        return {name: self._fill(name) for name in sorted(_FILLING)}

    def _fill(self, name: str) -> tuple[int, int]:
        with self._map(name) as fd:
            info = libbpf.map_info(fd)
            if name in _SOCKHASHES:
                return sum(1 for _ in libbpf.map_keys(fd, info.key_size)), info.max_entries
            return _count(fd), info.max_entries


def _count(fd: int) -> int:
    info = libbpf.map_info(fd)
    batches = libbpf.map_entries(fd, info.key_size, info.value_size)
    return sum(len(keys) for keys, _ in batches) // int(info.key_size)


def _room_key(which: Room) -> bytes:
    return int(which).to_bytes(4, "little")


def _listener_keys(netns: int, family: int) -> Iterator[bytes]:
    for slot in range(LISTENER_SLOTS):
        yield bytes(ListenerKey(netns=netns, family=family, slot=slot))


def _key(netns: int) -> bytes:
    return netns.to_bytes(8, "little")


def _entries(netns: int, lists: Lists) -> dict[str, dict[bytes, bytes]]:
    """By name of a map: keys and values."""
    return {
        "pods_by_address": {bytes(Address.of(ip)): _key(netns) for ip in lists.addresses},
        "cidrs": {
            _cidr_key(netns, which, network): _IN_LOOPBACK if network.is_loopback else _LISTED
            for which, networks in lists.cidrs.items()
            for network in networks
        }
        | {_cidr_key(netns, CidrSet.ROUTE, to): _LISTED for to in lists.links.beside}
        | {_cidr_key(netns, CidrSet.ROUTE, to): _BY_EXCLUDED for to in lists.links.through},
        "members": {
            bytes(MemberKey(netns=netns, value=value, set=which)): b"\1"
            for which, values in lists.members.items()
            for value in values
        }
        | {
            bytes(MemberKey(netns=netns, value=index, set=MemberSet.INTERFACE_EXCLUDE)): b"\1"
            for index in lists.links.excluded
        },
    }


def _keys(netns: int, several: Iterable[Lists]) -> dict[str, set[bytes]]:
    found = {name: set[bytes]() for name in _entries(netns, Lists())}
    for lists in several:
        for name, entries in _entries(netns, lists).items():
            found[name].update(entries)
    return found


_LISTED, _IN_LOOPBACK, _BY_EXCLUDED = (bytes([value]) for value in CidrValue)
#: struct cidr_key; ten thousand of them are made faster so than field by field.
_CIDR_KEY = struct.Struct("=IIII16s")


def _cidr_key(netns: int, which: CidrSet, network: IPNetwork) -> bytes:
    length = 96 + 128 - network.max_prefixlen + network.prefixlen
    low, high = netns & 0xFFFFFFFF, netns >> 32
    family = CIDR_V6 if network.version == 6 else 0
    return _CIDR_KEY.pack(length, low, high, which | family, mapped(network.network_address))


def _open_flow(keys: bytes, values: bytes, number: int) -> OpenFlow:
    return OpenFlow(
        FlowKey.from_buffer_copy(keys, number * ctypes.sizeof(FlowKey)),
        Flow.from_buffer_copy(values, number * ctypes.sizeof(Flow)),
    )


def _places(data: bytes, pattern: bytes, stride: int, offset: int) -> Iterator[int]:
    """Numbers of the structs of `stride` bytes that hold `pattern` at `offset`."""
    at = data.find(pattern)
    while at >= 0:
        if at % stride == offset:
            yield at // stride
        at = data.find(pattern, at + 1)
