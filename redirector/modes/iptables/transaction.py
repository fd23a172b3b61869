"""What a namespace's tables hold of ours, what they should hold, and the way there. Pure."""

import hashlib
import shlex
from collections import Counter
from dataclasses import dataclass

from redirector.model import Pod, Steering
from redirector.modes.iptables.rules import (
    CHAINS,
    INBOUND_CHAIN,
    IPV4,
    IPV6,
    JUMPS,
    KEEP_CHAIN,
    OWN_CHAINS,
    Family,
    NatRule,
    redirect,
    ruleset,
)
from redirector.steering import INBOUND_RULES, OUTBOUND_RULES

_HASH_LENGTH = 12


@dataclass(frozen=True)
class State:
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


def desired_state(steering: Steering, family: Family) -> State:
    lines = [rule.line() for rule in ruleset(steering, family)]
    # The jumps carry a hash of all rules, so that other rules under the same names are noticed.
    mark = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_HASH_LENGTH]
    lines += [
        f"-A {jump.base} {jump.match} -m comment --comment redirector:{mark} -j {jump.chain}"
        for jump in JUMPS
    ]
    return State(CHAINS, tuple(lines))


def kept_state(steering: Steering) -> State:
    """What keeps the NAT of open connections alive and steers nothing.

    The kernel tracks a namespace's connections only while a rule needs it (nf_ct_netns_get);
    without one, packets of redirected connections are no longer translated and are answered by a
    reset.
    """
    rule = NatRule(KEEP_CHAIN, "open-connections", "-p tcp", redirect(steering.outbound_port))
    return State((KEEP_CHAIN,), (rule.line(),))


def parse(saved: str) -> State:
    """Read our part out of what iptables-save prints."""
    chains, lines = [], []
    for line in saved.splitlines():
        words = line.split()
        if line.startswith(":") and words[0][1:] in OWN_CHAINS:
            chains.append(words[0][1:])
        elif line.startswith("-A ") and (words[1] in OWN_CHAINS or _target(words) in OWN_CHAINS):
            lines.append(line)
    return State(tuple(chains), tuple(lines))


def rule_packets(saved: str) -> dict[str, int]:
    """How many packets met each of our rules, by its name, in what iptables-save -c prints.

    Connections meet a nat rule once, by their first packet. What went through a chain of ours and
    met none of its rules counts for the rule that ends its table.
    """
    met: Counter[str] = Counter()
    for line in saved.splitlines():
        if not line.startswith("[") or "--comment" not in line:
            continue
        packets, words = int(line[1:].partition(":")[0]), shlex.split(line)[1:]
        if words[1] in CHAINS:
            met[words[words.index("--comment") + 1]] += packets
            met[_last_rule(words[1])] -= packets
        elif _target(words) in CHAINS:
            met[_last_rule(_target(words))] += packets
    return dict(met)


def _last_rule(chain: str) -> str:
    return (INBOUND_RULES if chain == INBOUND_CHAIN else OUTBOUND_RULES)[-1].name


def _target(words: list[str]) -> str:
    return words[words.index("-j") + 1] if "-j" in words else ""


def transaction(now: State, then: State) -> str:
    """Return what turns the one into the other, for `iptables-restore --noflush`.

    Base chains stay: with them would go the NAT hook, and with it the open connections' NAT.
    """
    jumps = [line for line in now.lines if line.split()[1] not in OWN_CHAINS]
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


def restore_text(pod: Pod, family: Family) -> str:
    """Return what `install` feeds to `family.restore` in a namespace that has nothing of ours."""
    return transaction(State(), desired_state(pod.steering, family))


def rules(pod: Pod) -> str:
    """Return the restore texts of both families, for a dry run."""
    return "".join(
        f"# {family.restore} --noflush\n{restore_text(pod, family)}" for family in (IPV4, IPV6)
    )
