"""Compares the rules with what the kernel has and commits the difference."""

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from redirector.errors import DatapathError, InputError, MachineError, RedirectorError
from redirector.model import Mode, Pod
from redirector.modes.base import DNS_GRACE_SECONDS
from redirector.modes.iptables import sets
from redirector.modes.iptables.programs import (
    commit,
    destroy_sets,
    make_sets,
    read,
    read_packets,
    read_sets,
    set_names,
)
from redirector.modes.iptables.tables import CHAINS, IPV4, IPV6, Family, Table
from redirector.modes.iptables.transaction import State, all_sets, desired_state, kept_state
from redirector.modes.iptables.zones import forget_direct, questions
from redirector.network import is_pods, open_connections, require_netns
from redirector.status import Outcome, Tally
from redirector.steering import INBOUND_RULES, OUTBOUND_RULES, Rule, Verdict

#: Where REDIRECT brings the pod's own (nf_nat_redirect_ipv4, nf_nat_redirect_ipv6).
_LOCALHOST = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
#: How long a sidecar may take to answer what it has been asked.
DRAIN_SECONDS = 1.0
_IF_INET6 = Path("/proc/net/if_inet6")


class IptablesMode:
    """Steers with NAT rules in the pod's own namespace; see `modes.base.ModeDriver`."""

    mode = Mode.IPTABLES

    def install(self, pod: Pod, had: Sequence[Pod] = ()) -> None:  # noqa: ARG002
        require_netns(pod.netns)
        desired = {family: desired_state(pod.steering, family) for family in _families()}
        before = {family: read(pod, family) for family in desired}
        old, new = _asked(before.values()), all_sets(desired.values())
        changed: list[Family] = []
        try:
            creation = sets.creation(new, read_sets(pod)) if new else ""
            if creation:
                make_sets(pod, creation)
            for family, state in before.items():
                if not state.same_rules(desired[family]):
                    # Even a failure may leave one table of two changed.
                    changed.append(family)
                    commit(pod, family, state, desired[family])
            if any(Table.RAW in desired[family].parts for family in changed):
                forget_direct(pod.netns, pod.steering.dns_port)
        except RedirectorError:
            for family in changed:
                state = read(pod, family)
                if not state.same_rules(before[family]):
                    commit(pod, family, state, before[family])
            # What made us fail is what the user must hear of.
            with contextlib.suppress(RedirectorError):
                destroy_sets(pod, set(set_names(pod)) - old)
            raise
        destroy_sets(pod, old - {each.name for each in new})

    def remove(self, pod: Pod, had: Sequence[Pod] = ()) -> None:  # noqa: ARG002
        try:
            # Another namespace may have taken the path, and be another pod's.
            if not is_pods(pod):
                return
        except InputError:
            return
        # One family that fails must not keep the other steered.
        errors: list[RedirectorError] = []
        kept: dict[Family, State] = {}
        asked: set[str] = set()
        for family in _families():
            try:
                state = read(pod, family)
                asked |= _asked([state])
                if state != State():
                    kept[family] = _steer_nothing(pod, family, state)
            except RedirectorError as error:
                errors.append(error)
        if any(Table.RAW in state.parts for state in kept.values()):
            _await_answers(pod)
        # Only now, when nothing new is redirected, can what is open be counted.
        try:
            open_versions = _redirected_versions(pod) if kept else set()
        except MachineError:
            # An idle rule too many is harmless, a broken connection is not.
            open_versions = {family.version for family in kept}
        for family, state in kept.items():
            rest = state.only(Table.NAT) if family.version in open_versions else State()
            try:
                if rest != state:
                    commit(pod, family, state, rest)
            except RedirectorError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        _drop_sets(pod, asked)

    def missing(self, pod: Pod) -> list[str]:
        try:
            require_netns(pod.netns)
        except InputError as error:
            return [str(error)]
        desired = {family: desired_state(pod.steering, family) for family in _families()}
        lost = [
            f"IPv{family.version} {what}"
            for family, state in desired.items()
            for what in _difference(state, read(pod, family))
        ]
        wanted = all_sets(desired.values())
        if wanted:
            found = read_sets(pod)
            lost += [
                f"set {each.name}"
                + (" as it was installed: somebody changed it" if each.name in found else "")
                for each in wanted
                if each.name not in found or not each.holds(found[each.name])
            ]
        return lost

    def tallies(self, pod: Pod) -> tuple[Tally, ...]:
        met: Counter[str] = Counter()
        for family in _families():
            met.update(read_packets(pod, family))
        totals: Counter[tuple[Outcome, str]] = Counter()
        for rule in (*OUTBOUND_RULES, *INBOUND_RULES):
            totals[_outcome(rule)] += met[rule.name]
        return tuple(Tally(*outcome, count) for outcome, count in totals.items())


def _outcome(rule: Rule) -> tuple[Outcome, str]:
    """By the names of eBPF mode's counters."""
    if rule.verdict is Verdict.DIRECT:
        return Outcome.DIRECT, rule.name
    own = rule.verdict is Verdict.INBOUND and rule in OUTBOUND_RULES
    return Outcome.STEERED, "self" if own else rule.verdict


def _asked(states: Iterable[State]) -> frozenset[str]:
    return frozenset[str]().union(*(sets.used_by(state.lines()) for state in states))


def _drop_sets(pod: Pod, asked: Collection[str]) -> None:
    """Destroy all sets of ours, also those that an install left when it was killed."""
    try:
        found = set_names(pod)
    except (MachineError, DatapathError):
        # Without ipset no set was made.
        if asked or all_sets(desired_state(pod.steering, family) for family in _families()):
            raise
        return
    destroy_sets(pod, found)


def _difference(wanted: State, found: State) -> Iterator[str]:
    for table in Table:
        present = found.part(table).signatures()
        for chain, expected in wanted.part(table).signatures().items():
            yield from _chain_difference(chain, expected, present.get(chain), table)


def _chain_difference(
    chain: str, expected: list[str], present: list[str] | None, table: Table
) -> Iterator[str]:
    absent = Counter(expected) - Counter(present or [])
    if chain not in CHAINS:
        yield from (f"jump from chain {chain} of table {table}" for _ in absent)
    elif present is None:
        yield f"chain {chain}"
    else:
        yield from (f"rule {name} in chain {chain}" for name in absent.elements())
    if (present or []) != expected and not absent:
        yield f"chain {chain} as it was installed: somebody added or moved rules"


def _steer_nothing(pod: Pod, family: Family, state: State) -> State:
    """Leave of our rules only what keeps open connections; return that."""
    kept = kept_state(pod.steering, state)
    if not state.same_rules(kept):
        commit(pod, family, state, kept)
    return kept


def _await_answers(pod: Pod) -> None:
    """Wait until the sidecar has answered what was captured, or has had its time."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < DRAIN_SECONDS:
        asked, unanswered = questions(pod.netns, pod.steering.dns_port)
        if not unanswered and (not asked or passed > DNS_GRACE_SECONDS):
            return
        time.sleep(0.005)


def _redirected_versions(pod: Pod) -> set[int]:
    """Return the IP versions of which connections are open that NAT brought to the sidecar.

    REDIRECT brings the pod's own to localhost, those from outside, or from virtual machines, to the
    address of the interface.
    """
    steering = pod.steering
    ports = {steering.outbound_port, steering.inbound_port, steering.dns_port}
    return {
        address.version
        for address, port in open_connections(pod.netns, ports)
        if port == steering.inbound_port or steering.kubevirt_interfaces or address in _LOCALHOST
    }


def _families() -> tuple[Family, ...]:
    # The file is absent when the kernel runs without IPv6; there is nothing to steer then.
    return (IPV4, IPV6) if _IF_INET6.exists() else (IPV4,)
