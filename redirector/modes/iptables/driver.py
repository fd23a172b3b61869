"""Compares the rules with what the kernel has and commits the difference."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from redirector.errors import InputError, MachineError, RedirectorError
from redirector.model import Mode, Pod
from redirector.modes.iptables.programs import commit, read, read_packets
from redirector.modes.iptables.rules import CHAINS, IPV4, IPV6, Family
from redirector.modes.iptables.transaction import State, desired_state, kept_state
from redirector.network import is_pods, open_connections, require_netns
from redirector.status import Outcome, Tally
from redirector.steering import INBOUND_RULES, LOCALHOST, OUTBOUND_RULES, Rule, Verdict

_IF_INET6 = Path("/proc/net/if_inet6")


class IptablesMode:
    """Steers with NAT rules in the pod's own namespace; see `modes.base.ModeDriver`."""

    mode = Mode.IPTABLES

    def install(self, pod: Pod) -> None:
        require_netns(pod.netns)
        before = {family: read(pod, family) for family in _families()}
        changed: list[Family] = []
        try:
            for family, state in before.items():
                desired = desired_state(pod.steering, family)
                if state.signatures() != desired.signatures():
                    commit(pod, family, state, desired)
                    changed.append(family)
        except RedirectorError:
            for family in changed:
                commit(pod, family, read(pod, family), before[family])
            raise

    def remove(self, pod: Pod) -> None:
        try:
            # Another namespace may have taken the path, and be another pod's.
            if not is_pods(pod):
                return
        except InputError:
            return
        # One family that fails must not keep the other steered.
        errors: list[RedirectorError] = []
        kept: list[Family] = []
        for family in _families():
            try:
                if _steer_nothing(pod, family):
                    kept.append(family)
            except RedirectorError as error:
                errors.append(error)
        # Only now, when nothing new is redirected, can what is open be counted.
        try:
            open_versions = _redirected_versions(pod) if kept else set()
        except MachineError:
            # An idle rule too many is harmless, a broken connection is not.
            open_versions = {family.version for family in kept}
        for family in kept:
            if family.version not in open_versions:
                try:
                    commit(pod, family, kept_state(pod.steering), State())
                except RedirectorError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def missing(self, pod: Pod) -> list[str]:
        try:
            require_netns(pod.netns)
        except InputError as error:
            return [str(error)]
        return [
            f"IPv{family.version} {what}"
            for family in _families()
            for what in _difference(
                desired_state(pod.steering, family).signatures(), read(pod, family).signatures()
            )
        ]

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


def _difference(wanted: dict[str, list[str]], found: dict[str, list[str]]) -> Iterator[str]:
    for chain, expected in wanted.items():
        present = found.get(chain, [])
        absent = Counter(expected) - Counter(present)
        if chain not in CHAINS:
            yield from (f"jump from chain {chain}" for _ in absent)
        elif chain not in found:
            yield f"chain {chain}"
        else:
            yield from (f"rule {name} in chain {chain}" for name in absent.elements())
        if present != expected and not absent:
            yield f"chain {chain} as it was installed: somebody added or moved rules"


def _steer_nothing(pod: Pod, family: Family) -> bool:
    """Leave of our rules only what keeps open connections; return whether there were any."""
    state, kept = read(pod, family), kept_state(pod.steering)
    if state == State():
        return False
    if state.signatures() != kept.signatures():
        commit(pod, family, state, kept)
    return True


def _redirected_versions(pod: Pod) -> set[int]:
    """Return the IP versions of which connections are open that NAT brought to the sidecar.

    REDIRECT brings the pod's own to localhost, those from outside to the pod's address.
    """
    steering = pod.steering
    ports = {steering.outbound_port, steering.inbound_port}
    return {
        address.version
        for address, port in open_connections(pod.netns, ports)
        if port == steering.inbound_port or address in LOCALHOST
    }


def _families() -> tuple[Family, ...]:
    # The file is absent when the kernel runs without IPv6; there is nothing to steer then.
    return (IPV4, IPV6) if _IF_INET6.exists() else (IPV4,)
