"""eBPF mode: programs on the pod's cgroup and network namespace, loaded once for a node."""

import sys
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

from redirector import network
from redirector.datapath.btf import knows_arrival_interface
from redirector.datapath.generation import Generation, Standing
from redirector.datapath.hooks import (
    ALL_HOOKS,
    CGROUP_HOOKS,
    CONNECT_HOOKS,
    DECIDING_HOOKS,
    DNS_ANSWER_HOOKS,
    DNS_QUERY_HOOKS,
    INBOUND_HOOK,
    PERMISSION_HOOKS,
)
from redirector.datapath.layout import (
    MAX_PROXY_IDS,
    Address,
    CidrSet,
    FlowFlag,
    MemberSet,
    PodEntry,
    PodFlag,
)
from redirector.datapath.libbpf import AttachType
from redirector.datapath.listeners import listening_sockets
from redirector.datapath.maps import Lists
from redirector.datapath.pins import Datapath
from redirector.errors import DatapathError, InputError
from redirector.model import EVERYWHERE, IPNetwork, Mode, Pod, without_links
from redirector.modes.base import DNS_GRACE_SECONDS
from redirector.status import Tally, tallies
from redirector.steering import RULES, Verdict

#: From a connection's SYN: how long its sidecar may take to ask for the original destination. One
#: that is throttled takes seconds; one that hangs, or never asks, should not hold us up.
DRAIN_SECONDS = 5.0
#: A connect() that was aimed at the sidecar just before the hooks went is no flow until its SYN is
#: sent; its process may have lost the CPU in between.
SYN_GRACE_SECONDS = 0.1
_OWN_PROGRAMS = "this version's programs"


class EbpfMode:
    """A ModeDriver (redirector.modes.base)."""

    mode = Mode.EBPF

    def __init__(self, datapath: Datapath, tell: Callable[[str], None] = lambda _: None) -> None:
        """`tell` hears what fails no command, and that somebody should know."""
        self._datapath = datapath
        self._tell = tell

    def install(self, pod: Pod, had: Sequence[Pod] = ()) -> None:
        """Attach the pod to the loaded programs; load them first if this is the node's first.

        Where it runs older programs these take over, each in the place of its forerunner. Should
        that be cut short at any point, the pod stays steered, and another call completes it.
        """
        self._datapath.ensure()
        maps, netns, lists = self._datapath.maps, pod.netns_cookie, _lists(pod)
        entry, before = pod_entry(pod, self._accelerates(pod)), maps.pod(netns)
        pins = pin_name(pod.name)
        older = [each for each in self._datapath.others() if pins in each.pods()]
        if older:
            entry.flags |= PodFlag.TAKEOVER
        try:
            # Lists that only the old entry asks for go last: at no moment are there too few.
            maps.add(netns, lists)
            maps.put_pod(netns, entry)
            self._attach(pod)
        except BaseException:
            if before is not None:
                maps.put_pod(netns, before)
                if had:
                    maps.drop(netns, (lists,), keep=map(_lists, had))
            elif not older:
                self.remove(pod, had)
            raise
        maps.drop(netns, map(_lists, had), keep=(lists,))

    def _attach(self, pod: Pod) -> None:
        pins = pin_name(pod.name)
        for hook, kind in self._hooks(pod):
            if hook == INBOUND_HOOK[0]:
                self._publish_listeners(pod)
                self._datapath.attach_inbound(pins, pod.netns_cookie, pod.netns)
            else:
                self._datapath.attach(pins, hook, kind, pod.cgroup)
        if not pod.steering.dns_capture:
            for hook, _ in (*DNS_QUERY_HOOKS, *DNS_ANSWER_HOOKS):
                self._datapath.detach(pins, hook)

    def _accelerates(self, pod: Pod) -> bool:
        return pod.accelerate.holds(defects=bool(self._datapath.defects()))

    def _hooks(self, pod: Pod) -> tuple[tuple[str, AttachType], ...]:
        """In the order in which they are attached."""
        hooks = ALL_HOOKS
        if pod.steering.dns_capture:
            decide = (INBOUND_HOOK, *DNS_QUERY_HOOKS, *CONNECT_HOOKS)
            hooks = (*CGROUP_HOOKS, *DNS_ANSWER_HOOKS, *decide)
        if self._datapath.refuses_splice() and self._accelerates(pod):
            return (*PERMISSION_HOOKS, *hooks)
        return hooks

    def _publish_listeners(self, pod: Pod) -> None:
        with listening_sockets(pod.netns, pod.cgroup, pod.steering.inbound_port) as sockets:
            for family, socket in sockets:
                self._datapath.maps.put_listener(pod.netns_cookie, family, socket)

    def remove(self, pod: Pod, had: Sequence[Pod] = ()) -> None:
        """Detach. What was steered a moment ago still gets its original destination."""
        pins = pin_name(pod.name)
        for hook, _ in (*DECIDING_HOOKS, *DNS_QUERY_HOOKS):
            self._datapath.detach(pins, hook)
        self._drain(pod)
        self._datapath.forget(pins)
        for generation in self._datapath.others():
            generation.withdraw(pod)
        if self._datapath.is_loaded():
            self._datapath.maps.delete_pod(pod.netns_cookie)
            self._datapath.maps.drop(pod.netns_cookie, map(_lists, (pod, *had)))

    def remove_unknown(self, name: str, cookies: Sequence[int]) -> None:
        """The same for a pod of which only this is known."""
        self._datapath.forget(pin_name(name))
        if self._datapath.is_loaded():
            for cookie in cookies:
                self._datapath.maps.delete_pod(cookie)
                self._datapath.maps.drop_all(cookie)

    def _drain(self, pod: Pod) -> None:
        if self._datapath.is_loaded() and self._datapath.maps.pod(pod.netns_cookie) is not None:
            time.sleep(DNS_GRACE_SECONDS if pod.steering.dns_capture else SYN_GRACE_SECONDS)
        older = self._datapath.others()
        deadline = time.monotonic() + DRAIN_SECONDS
        young = time.monotonic_ns() - int(DRAIN_SECONDS * 1e9)
        while waiting := [opened for opened in self._unanswered(pod) if opened > young]:
            patience = time.monotonic_ns() - int(DRAIN_SECONDS * 1e9)
            if all(opened < patience for opened in waiting):
                self._tell(
                    f"pod {pod.name}: its sidecar has not taken {len(waiting)} of the connections "
                    f"that were steered to it, for {DRAIN_SECONDS:g} s; nobody tells it any more "
                    "where they were to go"
                )
                break
            time.sleep(0.005)
        while time.monotonic() < deadline and any(each.standing().waits(pod) for each in older):
            time.sleep(0.005)

    def _unanswered(self, pod: Pod) -> list[int]:
        """When those began that its sidecar has yet to ask about (CLOCK_MONOTONIC, ns)."""
        if not self._datapath.is_loaded():
            return []
        return [
            found.flow.opened_ns
            for found in self._datapath.maps.flows_of(pod.netns_cookie)
            if found.flow.flags & FlowFlag.STEERED
            and not found.flow.flags & FlowFlag.ANSWERED
            # Who answers DNS has no need to know.
            and RULES[found.flow.rule].verdict is not Verdict.DNS
        ]

    def sweep(self, pods: Sequence[Pod]) -> None:
        """Let go of older generations what no connection needs any more. Idempotent.

        `pods` are all that are enrolled; those of another mode have nothing here.
        """
        older = [(each, each.standing()) for each in self._datapath.others()]
        if not older:
            return
        moved = [pod for pod in pods if self._datapath.decides(pin_name(pod.name))]
        for pod in moved:
            self._leave(pod, older)
        for generation, _ in older:
            if not generation.pods():
                generation.unpin()

    def _leave(self, pod: Pod, older: Sequence[tuple[Generation, Standing]]) -> None:
        maps, pins = self._datapath.maps, pin_name(pod.name)
        entry = maps.pod(pod.netns_cookie)
        waits = any(standing.waits(pod) for _, standing in older)
        if entry is not None and entry.flags & PodFlag.TAKEOVER and not waits:
            entry.flags &= ~PodFlag.TAKEOVER
            maps.put_pod(pod.netns_cookie, entry)
        for generation, standing in older:
            if pins in generation.pods() and not standing.holds(pod):
                self._datapath.forget_in(generation, pins)
                generation.withdraw(pod)

    def missing(self, pod: Pod) -> list[str]:
        """Name the hooks that do not hold, and what the maps lack: its entry, its new addresses.

        Of a pod that another version steers only this is said, that this one's programs do not.
        """
        pins = pin_name(pod.name)
        hooks = [hook for hook, _ in self._hooks(pod)]
        entered = self._datapath.is_loaded() and self._datapath.maps.pod(pod.netns_cookie)
        if entered and all(self._datapath.is_own(pins, h, _target(pod, h)) for h in hooks):
            return _unknown_addresses(pod)
        lost = [hook for hook in hooks if not self._datapath.holds(pins, hook, _target(pod, hook))]
        decided = {hook for hook, _ in DECIDING_HOOKS}.isdisjoint(lost)
        if decided and not self._datapath.decides(pins):
            return [_OWN_PROGRAMS]
        if not self._datapath.is_loaded():
            return ["the programs"]
        if self._datapath.maps.pod(pod.netns_cookie) is None:
            lost.append("its entry in the pods map")
        if not lost and not all(self._datapath.is_own(pins, hook) for hook in hooks):
            return [_OWN_PROGRAMS]
        return lost

    def tallies(self, pod: Pod) -> tuple[Tally, ...]:
        """From the pod's counters; none when it has no entry."""
        if not self._datapath.is_loaded():
            return ()
        counted = self._datapath.maps.counted(pod.netns_cookie)
        return tallies(counted.counters(), counted.rules())


def _unknown_addresses(pod: Pod) -> list[str]:
    """What the namespace has by now and the programs do not know; nothing while it has none."""
    # The kernel makes those of IPv6 links, which hardly anybody uses, a moment after the link.
    found, known = without_links(network.addresses(pod.netns)), set(without_links(pod.addresses))
    if not found or set(found) == known:
        return []
    new = [f"its address {ip}" for ip in found if ip not in known]
    return new or ["addresses as they are by now"]


def _target(pod: Pod, hook: str) -> Path:
    return pod.netns if hook == INBOUND_HOOK[0] else pod.cgroup


def pin_name(pod: str) -> str:
    """A pod's directory under bpffs, which refuses dots in names (kernel/bpf/inode.c)."""
    return pod.replace("%", "%25").replace(".", "%2e").replace("/", "%2f")


def pod_entry(pod: Pod, accelerate: bool) -> PodEntry:
    """The pod as the programs know it. InputError when it does not fit their layout."""
    steering = pod.steering
    for option, used in (
        ("kubevirtInterfaces", steering.kubevirt_interfaces),
        ("dropInvalid", steering.drop_invalid),
    ):
        if used:
            raise InputError(
                f"pod {pod.name}: {option}: eBPF mode does not know it; use --mode iptables"
            )
    for name, ids in (("proxyUID", steering.proxy_uids), ("proxyGID", steering.proxy_gids)):
        if len(ids) > MAX_PROXY_IDS:
            raise InputError(
                f"pod {pod.name}: {name} {','.join(map(str, ids))}: at most {MAX_PROXY_IDS} "
                "in eBPF mode; name fewer or use --mode iptables"
            )
    flags = PodFlag(0)
    if accelerate:
        flags |= PodFlag.ACCELERATE
    if EVERYWHERE[0] in steering.include_outbound_cidrs:
        flags |= PodFlag.INCLUDE_ALL_V4
    if EVERYWHERE[1] in steering.include_outbound_cidrs:
        flags |= PodFlag.INCLUDE_ALL_V6
    if steering.exclude_outbound_cidrs or _partial(steering.include_outbound_cidrs):
        flags |= PodFlag.HAS_CIDRS
    if (
        steering.include_outbound_ports
        or steering.exclude_outbound_ports
        or steering.exclude_inbound_ports
    ):
        flags |= PodFlag.HAS_PORTS
    if steering.include_inbound_ports is not None:
        flags |= PodFlag.INBOUND_LIST
    if steering.include_owner_groups is not None:
        flags |= PodFlag.GROUP_LIST
    if steering.exclude_owner_groups:
        flags |= PodFlag.GROUP_EXCLUDED
    if steering.dns_capture:
        flags |= PodFlag.DNS
    if steering.dns_servers is None:
        flags |= PodFlag.DNS_ANY
    if steering.exclude_interfaces:
        if not knows_arrival_interface():
            raise InputError(
                f"pod {pod.name}: excludeInterfaces: this kernel does not tell eBPF by which "
                "interface a connection comes in (Linux 5.17 does); use --mode iptables"
            )
        flags |= PodFlag.INTERFACES
    if pod.repeated:
        flags |= PodFlag.REPEATED
    # One of an IPv6 link would need the link beside it, which no hook can tell.
    ip4 = [ip for ip in pod.aims if isinstance(ip, IPv4Address)]
    ip6 = [ip for ip in pod.aims if isinstance(ip, IPv6Address)]
    if not ip4 and not ip6:
        raise DatapathError(
            f"pod {pod.name}: {pod.netns} has no address but loopback; enroll it once its "
            "network is up"
        )
    entry = PodEntry(
        ip4=Address.of(ip4[0]) if ip4 else Address(),
        ip6=Address.of(ip6[0]) if ip6 else Address(),
        proxy_uids=len(steering.proxy_uids),
        proxy_gids=len(steering.proxy_gids),
        flags=flags,
        host_loopback=_network_order(steering.host_loopback_range.network_address),
        host_loopback_mask=_network_order(steering.host_loopback_range.netmask),
        outbound_port=steering.outbound_port,
        inbound_port=steering.inbound_port,
        dns_port=steering.dns_port,
    )
    _fill(entry.proxy_uid, [pod.ids.user(uid) for uid in steering.proxy_uids])
    _fill(entry.proxy_gid, [pod.ids.group(gid) for gid in steering.proxy_gids])
    return entry


def _lists(pod: Pod) -> Lists:
    steering = pod.steering
    return Lists(
        addresses=pod.unique,
        links=pod.links,
        cidrs={
            CidrSet.INCLUDE: _partial(steering.include_outbound_cidrs),
            CidrSet.EXCLUDE: steering.exclude_outbound_cidrs,
            CidrSet.RESOLVER: tuple(map(ip_network, steering.dns_servers or ())),
            CidrSet.OWN: tuple(map(ip_network, (*pod.of_links, *pod.repeated))),
        },
        members={
            MemberSet.OUTBOUND_PORT_INCLUDE: steering.include_outbound_ports,
            MemberSet.OUTBOUND_PORT_EXCLUDE: steering.exclude_outbound_ports,
            MemberSet.INBOUND_PORT_INCLUDE: steering.include_inbound_ports or frozenset(),
            MemberSet.INBOUND_PORT_EXCLUDE: steering.exclude_inbound_ports,
            MemberSet.GROUP_INCLUDE: set(map(pod.ids.group, steering.include_owner_groups or ())),
            MemberSet.GROUP_EXCLUDE: set(map(pod.ids.group, steering.exclude_owner_groups)),
        },
    )


def _network_order(ip: IPv4Address) -> int:
    """As a __be32 in this machine's memory."""
    return int.from_bytes(ip.packed, sys.byteorder)


def _fill(array: "object", values: Sequence[int]) -> None:
    for index, value in enumerate(values):
        array[index] = value  # type: ignore[index]


def _partial(networks: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
    """Those that are not a whole family, which a flag says more cheaply."""
    return tuple(network for network in networks if network.prefixlen)
