"""The iptables mode: the decisions of `redirector.steering` as NAT rules in the pod's netns.

The rules are data (`ruleset`); the driver compares them with what the kernel has and commits the
difference, one transaction for IPv4 and one for IPv6.

Only a connection's SYN meets the rules. conntrack picks up streams in their middle
(nf_conntrack_tcp_loose), and a REDIRECT of one that was opened without us would break it.
"""

import hashlib
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from redirector.errors import DatapathError, InputError, MachineError, RedirectorError
from redirector.machine import find_tool
from redirector.model import IPNetwork, Mode, Pod, Steering
from redirector.network import is_pods, open_connections, require_netns, run_in
from redirector.steering import LOCALHOST, TUNNEL_PORT, honoured_loopback

OUTPUT_CHAIN = "REDIRECTOR_OUTPUT"
INBOUND_CHAIN = "REDIRECTOR_INBOUND"
CHAINS = (OUTPUT_CHAIN, INBOUND_CHAIN)
#: What `remove` leaves while redirected connections are open; nothing jumps to it.
KEEP_CHAIN = "REDIRECTOR_KEEP"
_OWN_CHAINS = (*CHAINS, KEEP_CHAIN)

#: xt_multiport takes this many ports (XT_MULTI_PORTS).
_MULTIPORT = 15
_HASH_LENGTH = 12
#: How long to wait for another program that changes rules (/run/xtables.lock).
_LOCK_SECONDS = 10
_IF_INET6 = Path("/proc/net/if_inet6")


@dataclass(frozen=True)
class Family:
    """What differs between IPv4 and IPv6."""

    version: int
    restore: str
    save: str
    localhost: str
    passthrough: str


IPV4 = Family(4, "iptables-restore", "iptables-save", "127.0.0.1/32", "127.0.0.6/32")
IPV6 = Family(6, "ip6tables-restore", "ip6tables-save", "::1/128", "::6/128")


@dataclass(frozen=True)
class NatRule:
    """One rule of a chain of ours, under the name of the steering rule that it carries out."""

    chain: str
    name: str
    match: str
    target: str

    def line(self) -> str:
        return f"-A {self.chain} {self.match} -m comment --comment {self.name} -j {self.target}"


@dataclass(frozen=True)
class Jump:
    """What sends packets from a base chain to a chain of ours."""

    base: str
    match: str
    chain: str


JUMPS = (
    Jump("OUTPUT", "-p tcp --syn", OUTPUT_CHAIN),
    # What comes over lo has been through OUTPUT: it is the pod's own, not from outside.
    Jump("PREROUTING", "! -i lo -p tcp --syn", INBOUND_CHAIN),
)


def ruleset(steering: Steering, family: Family) -> tuple[NatRule, ...]:
    """Return the rules of one family, in order."""
    return (*_output_rules(steering, family), *_inbound_rules(steering))


def restore_text(pod: Pod, family: Family) -> str:
    """Return what `install` feeds to `family.restore` in a namespace that has nothing of ours."""
    return _transaction(_State(), _desired(pod.steering, family))


def rules(pod: Pod) -> str:
    """Return the restore texts of both families, for a dry run."""
    return "".join(
        f"# {family.restore} --noflush\n{restore_text(pod, family)}" for family in (IPV4, IPV6)
    )


def _output_rules(steering: Steering, family: Family) -> Iterator[NatRule]:
    def rule(name: str, match: str, target: str) -> NatRule:
        return NatRule(OUTPUT_CHAIN, f"outbound.{name}", match, target)

    to_outbound = _redirect(steering.outbound_port)
    to_inbound = _redirect(steering.inbound_port)
    for ports in _multiports(steering.exclude_outbound_ports):
        yield rule("excluded-port", ports, "RETURN")
    yield rule("passthrough", f"-s {family.passthrough} -o lo", "RETURN")
    for uid in steering.proxy_uids[:1]:
        yield rule(
            "proxy-self",
            f"! -d {family.localhost} -o lo -p tcp ! --dport {TUNNEL_PORT}"
            f" -m owner --uid-owner {uid}",
            to_inbound,
        )
    for uid in steering.proxy_uids:
        yield rule("proxy-uid", f"-m owner --uid-owner {uid}", "RETURN")
    for gid in steering.proxy_gids:
        yield rule("proxy-gid", f"-m owner --gid-owner {gid}", "RETURN")
    yield rule("app-local", f"-d {family.localhost}", "RETURN")
    for net in _of(family, steering.exclude_outbound_cidrs):
        yield rule("excluded-cidr", f"-d {net}", "RETURN")
    # Of what goes over lo, only loopback beside localhost can be captured, by naming its range.
    for net in _of(family, honoured_loopback(steering)):
        yield rule("included-cidr", f"-d {net} -o lo -p tcp", to_outbound)
    yield rule("app-local", "-o lo", "RETURN")
    for ports in _multiports(steering.include_outbound_ports):
        yield rule("included-port", ports, to_outbound)
    for net in _of(family, steering.include_outbound_cidrs):
        yield rule("included-cidr", f"-d {net} -p tcp", to_outbound)


def _inbound_rules(steering: Steering) -> Iterator[NatRule]:
    def rule(name: str, match: str, target: str) -> NatRule:
        return NatRule(INBOUND_CHAIN, f"inbound.{name}", match, target)

    to_inbound = _redirect(steering.inbound_port)
    yield rule("tunnel-port", f"-p tcp --dport {TUNNEL_PORT}", "RETURN")
    if steering.include_inbound_ports is None:
        for ports in _multiports(steering.exclude_inbound_ports):
            yield rule("excluded-port", ports, "RETURN")
        yield rule("included-port", "-p tcp", to_inbound)
    else:
        for ports in _multiports(steering.include_inbound_ports):
            yield rule("included-port", ports, to_inbound)


def _redirect(port: int) -> str:
    return f"REDIRECT --to-ports {port}"


def _of(family: Family, networks: Iterable[IPNetwork]) -> Iterator[IPNetwork]:
    return (net for net in networks if net.version == family.version)


def _multiports(ports: frozenset[int]) -> Iterator[str]:
    ordered = [str(port) for port in sorted(ports)]
    for start in range(0, len(ordered), _MULTIPORT):
        yield f"-p tcp -m multiport --dports {','.join(ordered[start : start + _MULTIPORT])}"


@dataclass(frozen=True)
class _State:
    """Our part of a namespace's nat table: our chains, their rules, and the jumps to them.

    `lines` are `-A` lines as iptables-save prints them or as we would write them.
    """

    chains: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    def signatures(self) -> dict[str, list[str]]:
        """Return what tells the rules apart, by chain: the comments.

        The rest of a line is printed as each version of iptables likes it.
        """
        found: dict[str, list[str]] = {chain: [] for chain in self.chains}
        for line in self.lines:
            words = shlex.split(line)
            comment = words[words.index("--comment") + 1] if "--comment" in words else "no comment"
            found.setdefault(words[1], []).append(comment)
        return found


def _desired(steering: Steering, family: Family) -> _State:
    lines = [rule.line() for rule in ruleset(steering, family)]
    # The jumps carry a hash of all rules, so that other rules under the same names are noticed.
    mark = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_HASH_LENGTH]
    lines += [
        f"-A {jump.base} {jump.match} -m comment --comment redirector:{mark} -j {jump.chain}"
        for jump in JUMPS
    ]
    return _State(CHAINS, tuple(lines))


def _kept(steering: Steering) -> _State:
    """What keeps the NAT of open connections alive and steers nothing.

    The kernel tracks a namespace's connections only while a rule needs it (nf_ct_netns_get);
    without one, packets of redirected connections are no longer translated and are answered by a
    reset.
    """
    rule = NatRule(KEEP_CHAIN, "open-connections", "-p tcp", _redirect(steering.outbound_port))
    return _State((KEEP_CHAIN,), (rule.line(),))


def _parse(saved: str) -> _State:
    """Read our part out of what iptables-save prints."""
    chains, lines = [], []
    for line in saved.splitlines():
        words = line.split()
        if line.startswith(":") and words[0][1:] in _OWN_CHAINS:
            chains.append(words[0][1:])
        elif line.startswith("-A ") and (words[1] in _OWN_CHAINS or _target(words) in _OWN_CHAINS):
            lines.append(line)
    return _State(tuple(chains), tuple(lines))


def _target(words: list[str]) -> str:
    return words[words.index("-j") + 1] if "-j" in words else ""


def _transaction(now: _State, then: _State) -> str:
    """Return what turns the one into the other, for `iptables-restore --noflush`.

    Base chains stay: with them would go the NAT hook, and with it the open connections' NAT.
    """
    jumps = [line for line in now.lines if line.split()[1] not in _OWN_CHAINS]
    gone = [chain for chain in now.chains if chain not in then.chains]
    return "\n".join(
        [
            "*nat",
            *(f"-D{line[2:]}" for line in jumps),
            # Declaring a chain empties it when it is there.
            *(f":{chain} - [0:0]" for chain in then.chains),
            *then.lines,
            *(f"{verb} {chain}" for verb in ("-F", "-X") for chain in gone),
            "COMMIT\n",
        ]
    )


class IptablesMode:
    """Steers with NAT rules in the pod's own namespace; see `modes.base.ModeDriver`."""

    mode = Mode.IPTABLES

    def install(self, pod: Pod) -> None:
        require_netns(pod.netns)
        before = {family: _read(pod, family) for family in _families()}
        changed: list[Family] = []
        try:
            for family, state in before.items():
                desired = _desired(pod.steering, family)
                if state.signatures() != desired.signatures():
                    _commit(pod, family, state, desired)
                    changed.append(family)
        except RedirectorError:
            for family in changed:
                _commit(pod, family, _read(pod, family), before[family])
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
                    _commit(pod, family, _kept(pod.steering), _State())
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
                _desired(pod.steering, family).signatures(), _read(pod, family).signatures()
            )
        ]


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
    state, kept = _read(pod, family), _kept(pod.steering)
    if state == _State():
        return False
    if state.signatures() != kept.signatures():
        _commit(pod, family, state, kept)
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


def _read(pod: Pod, family: Family) -> _State:
    return _parse(_run(pod, [family.save, "-t", "nat"]))


def _commit(pod: Pod, family: Family, now: _State, then: _State) -> None:
    _run(pod, [family.restore, "--noflush", f"--wait={_LOCK_SECONDS}"], _transaction(now, then))


def _run(pod: Pod, argv: list[str], stdin: str = "") -> str:
    program = find_tool(argv[0], package="iptables")
    try:
        done = run_in(pod.netns, [str(program), *argv[1:]], stdin)
    except subprocess.TimeoutExpired:
        raise DatapathError(
            f"pod {pod.name}: {argv[0]} hangs; another program may hold the iptables lock"
        ) from None
    except OSError as error:
        raise MachineError(f"pod {pod.name}: cannot run {program}: {error.strerror}") from None
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise DatapathError(f"pod {pod.name}: {argv[0]} refused: {_with_line(reason, stdin)}")
    return done.stdout


def _with_line(reason: str, stdin: str) -> str:
    """Add the text of the line that the program names: its own message shows only a number."""
    number = re.search(r"line:? (\d+)", reason)
    lines = stdin.splitlines()
    if number is None or not 1 <= int(number[1]) <= len(lines):
        return reason
    return f"{reason} ({lines[int(number[1]) - 1]})"
