"""Typed access to the pinned maps: what the programs are told of a pod, and what they tell."""

import contextlib
import ctypes
import errno
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.layout import (
    About,
    Address,
    CidrKey,
    CidrSet,
    CidrValue,
    Counter,
    Counters,
    Flow,
    FlowKey,
    ListenerKey,
    MemberKey,
    MemberSet,
    PodEntry,
)
from redirector.errors import DatapathError
from redirector.model import IPAddress, IPNetwork
from redirector.steering import RULES


@dataclass(frozen=True)
class OpenFlow:
    """One open connection as the kernel keeps it."""

    key: FlowKey
    flow: Flow


#: Their values are sockets, which the kernel does not show in batches.
_SOCKHASHES = frozenset({"listeners", "sockets"})
#: The maps that pods and connections fill.
_FILLING = frozenset({"cidrs", "flows", "members", "pods", "pods_by_address"}) | _SOCKHASHES
#: netns cookie -> bytes and messages redirected.
Moved = dict[int, tuple[int, int]]

Cidrs = Mapping[CidrSet, Collection[IPNetwork]]
Members = Mapping[MemberSet, Collection[int]]


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
            full = "; the map is full" if error.errno == errno.E2BIG else ""
            raise DatapathError(f"map {name}: {error.strerror or error}{full}") from error

    def about(self) -> About:
        """What is said of the datapath as a whole."""
        with self._map("about") as fd:
            raw = libbpf.map_lookup(fd, bytes(4), ctypes.sizeof(About))
        if raw is None:
            raise DatapathError(f"{self._directory}/about: is empty; use: redirector uninstall")
        return About.from_buffer_copy(raw)

    def put_pod(self, netns: int, entry: PodEntry) -> None:
        """Publish a pod's steering; from here on the programs act on its namespace."""
        cpus = libbpf.possible_cpus()
        with self._map("counters") as fd:
            if libbpf.map_lookup(fd, _key(netns), ctypes.sizeof(Counters) * cpus) is None:
                libbpf.map_update(fd, _key(netns), bytes(ctypes.sizeof(Counters) * cpus))
        with self._map("pods") as fd:
            libbpf.map_update(fd, _key(netns), bytes(entry))

    def delete_pod(self, netns: int) -> None:
        """Forget the pod's steering, listeners, counters and open flows; its lists have `put_`."""
        for name in ("pods", "counters"):
            with self._map(name) as fd:
                libbpf.map_delete(fd, _key(netns))
        with self._map("listeners") as fd:
            for family in (socket.AF_INET, socket.AF_INET6):
                libbpf.map_delete(fd, bytes(ListenerKey(netns=netns, family=family)))
        found = self.flows_of(netns)
        with self._map("flows") as fd:
            for opened in found:
                libbpf.map_delete(fd, bytes(opened.key))

    # What a pod had is told by who calls: to look for it would cost with every pod of the node.

    def put_addresses(
        self, netns: int, addresses: Collection[IPAddress], had: Collection[IPAddress] = ()
    ) -> None:
        """Make these the pod's own addresses, and those it had no longer."""
        wanted = {bytes(Address.of(ip)) for ip in addresses}
        with self._map("pods_by_address") as fd:
            for key in {bytes(Address.of(ip)) for ip in had} - wanted:
                # Another pod may have taken it over.
                if libbpf.map_lookup(fd, key, 8) == _key(netns):
                    libbpf.map_delete(fd, key)
            for key in wanted:
                libbpf.map_update(fd, key, _key(netns))

    def put_cidrs(self, netns: int, lists: Cidrs, had: Iterable[Cidrs] = ()) -> None:
        """Make these the pod's CIDR lists, and those it had no longer."""
        wanted = {
            _cidr_key(netns, which, network): (
                CidrValue.IN_LOOPBACK if network.is_loopback else CidrValue.LISTED
            )
            for which, networks in lists.items()
            for network in networks
        }
        stale = {
            _cidr_key(netns, which, network)
            for before in had
            for which, networks in before.items()
            for network in networks
        }
        self._replace("cidrs", {key: bytes([value]) for key, value in wanted.items()}, stale)

    def put_members(self, netns: int, sets: Members, had: Iterable[Members] = ()) -> None:
        """Make these the pod's sets of ports and groups, and those it had no longer."""
        stale = {key for before in had for key in _member_keys(netns, before)}
        self._replace("members", dict.fromkeys(_member_keys(netns, sets), b"\1"), stale)

    def _replace(self, name: str, wanted: Mapping[bytes, bytes], stale: set[bytes]) -> None:
        with self._map(name) as fd:
            for key in stale.difference(wanted):
                libbpf.map_delete(fd, key)
            for key, value in wanted.items():
                libbpf.map_update(fd, key, value)

    def put_listener(self, netns: int, family: int, listener: int) -> None:
        """Make a listening socket's descriptor the pod's inbound listener of its family."""
        with self._map("listeners") as fd:
            key = bytes(ListenerKey(netns=netns, family=family))
            libbpf.map_update(fd, key, listener.to_bytes(4, "little"))

    def has_pod(self, netns: int) -> bool:
        """Whether the programs act on this namespace."""
        with self._map("pods") as fd:
            return libbpf.map_lookup(fd, _key(netns), ctypes.sizeof(PodEntry)) is not None

    def counters(self, netns: int, moved: Moved | None = None) -> dict[Counter, int]:
        """A pod's counters, all CPUs together, the open flows' redirected bytes included.

        `moved` is what `moved()` has answered, for who asks for many pods.
        """
        found = self._counters(netns)
        totals = {counter: sum(cpu.value[counter] for cpu in found) for counter in Counter}
        redirected, messages = (self.moved() if moved is None else moved).get(netns, (0, 0))
        totals[Counter.REDIRECTED_BYTES] += redirected
        totals[Counter.REDIRECTED_MESSAGES] += messages
        return totals

    def rules(self, netns: int) -> dict[str, int]:
        """How many of a pod's connections each rule of `steering.RULES` decided, by its name."""
        found = self._counters(netns)
        return {
            rule.name: sum(cpu.rule[index] for cpu in found) for index, rule in enumerate(RULES)
        }

    def _counters(self, netns: int) -> list[Counters]:
        """One for each CPU; [] when the pod has none."""
        size = ctypes.sizeof(Counters)
        with self._map("counters") as fd:
            raw = libbpf.map_lookup(fd, _key(netns), size * libbpf.possible_cpus()) or b""
        return [Counters.from_buffer_copy(raw, start) for start in range(0, len(raw), size)]

    def moved(self) -> Moved:
        """What the open flows have redirected, in one pass over them all."""
        found: Moved = {}
        for opened in self.flows():
            size, messages = sum(opened.flow.bytes), sum(opened.flow.messages)
            if messages:
                netns = opened.flow.client_netns
                before = found.get(netns, (0, 0))
                found[netns] = (before[0] + size, before[1] + messages)
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

    def _flow_batches(self) -> Iterator[tuple[bytes, bytes]]:
        with self._map("flows") as fd:
            yield from libbpf.map_entries(fd, ctypes.sizeof(FlowKey), ctypes.sizeof(Flow))

    def fills(self) -> dict[str, tuple[int, int]]:
        """By name of a map: how many entries it holds, and how many it has room for."""
        return {name: self._fill(name) for name in sorted(_FILLING)}

    def _fill(self, name: str) -> tuple[int, int]:
        with self._map(name) as fd:
            info = libbpf.map_info(fd)
            if name in _SOCKHASHES:
                return sum(1 for _ in libbpf.map_keys(fd, info.key_size)), info.max_entries
            batches = libbpf.map_entries(fd, info.key_size, info.value_size)
            return sum(len(keys) for keys, _ in batches) // info.key_size, info.max_entries


def _key(netns: int) -> bytes:
    return netns.to_bytes(8, "little")


def _cidr_key(netns: int, which: CidrSet, network: IPNetwork) -> bytes:
    family_bits = 128 - network.max_prefixlen
    return bytes(
        CidrKey(
            prefixlen=96 + family_bits + network.prefixlen,
            netns_low=netns & 0xFFFFFFFF,
            netns_high=netns >> 32,
            set=which,
            ip=Address.of(network.network_address),
        )
    )


def _member_keys(netns: int, sets: Members) -> Iterator[bytes]:
    for which, values in sets.items():
        for value in values:
            yield bytes(MemberKey(netns=netns, value=value, set=which))


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
