"""What a namespace's tables hold of ours, what they should hold, and the way there. Pure."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from redirector.model import Pod, Steering
from redirector.modes.iptables import sets
from redirector.modes.iptables.rules import dns_answers, jumps, redirect, ruleset
from redirector.modes.iptables.sets import IpSet
from redirector.modes.iptables.tables import (
    CHAINS,
    DNS_CHAIN,
    INBOUND_CHAIN,
    IPV4,
    IPV6,
    KEEP_CHAIN,
    OUTPUT_CHAIN,
    OWN_CHAINS,
    Family,
    Jump,
    Rule,
    Table,
)
from redirector.steering import INBOUND_RULES, OUTBOUND_RULES

_HASH_LENGTH = 12


@dataclass(frozen=True)
class Part:
    """Our part of one table: our chains, their rules, and the jumps to them.

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


@dataclass(frozen=True)
class State:
    """Our part of a namespace's tables, for one family; `sets` are those that its rules ask."""

    parts: dict[Table, Part] = field(default_factory=dict)
    sets: tuple[IpSet, ...] = ()

    def part(self, table: Table) -> Part:
        return self.parts.get(table, Part())

    def only(self, table: Table) -> "State":
        return State({table: self.part(table)})

    def lines(self) -> list[str]:
        return [line for part in self.parts.values() for line in part.lines]

    def same_rules(self, other: "State") -> bool:
        return all(
            self.part(table).signatures() == other.part(table).signatures() for table in Table
        )


def desired_state(steering: Steering, family: Family) -> State:
    return _state(ruleset(steering, family), tuple(jumps(steering, family)))


def _state(rules: Iterable[Rule], jumps: Iterable[Jump]) -> State:
    rules, jumps = tuple(rules), tuple(jumps)
    lines = [(CHAINS[rule.chain], rule.line()) for rule in rules]
    # The jumps carry a hash of all rules, so that other rules under the same names are noticed.
    mark = hashlib.sha256("\n".join(line for _, line in lines).encode()).hexdigest()[:_HASH_LENGTH]
    lines += [
        (
            CHAINS[jump.chain],
            f"-A {jump.base} {jump.match} -m comment --comment redirector:{mark} -j {jump.chain}",
        )
        for jump in jumps
    ]
    chains = dict.fromkeys(jump.chain for jump in jumps)
    asked = dict.fromkeys(rule.asks for rule in rules if rule.asks is not None)
    return State(_parts(((chain, CHAINS[chain]) for chain in chains), lines), tuple(asked))


def all_sets(states: Iterable[State]) -> tuple[IpSet, ...]:
    """Return the sets of these states, each once: a list of ports serves both families."""
    return tuple(dict.fromkeys(each for state in states for each in state.sets))


def kept_state(steering: Steering, now: State) -> State:
    """What keeps the NAT of open connections alive and steers nothing.

    The kernel tracks a namespace's connections only while a rule needs it (nf_ct_netns_get);
    without one, packets of redirected connections are no longer translated and are answered by a
    reset. Where DNS was captured, answers still find their questions.
    """
    rule = Rule(KEEP_CHAIN, "open-connections", "-p tcp", redirect(steering.outbound_port))
    parts = {Table.NAT: Part((KEEP_CHAIN,), (rule.line(),))}
    if DNS_CHAIN in now.part(Table.RAW).chains:
        jump, answer = dns_answers(steering)
        parts |= _state([answer], [jump]).parts
    return State(parts)


def parse(saved: str) -> State:
    """Read our part out of what iptables-save prints."""
    chains: list[tuple[str, Table]] = []
    lines: list[tuple[Table, str]] = []
    table: Table | None = None
    for line in saved.splitlines():
        words = line.split()
        if line.startswith("*"):
            table = next((each for each in Table if each == line[1:]), None)
        elif table is None:
            continue
        elif line.startswith(":") and _is_own(words[0][1:], table):
            chains.append((words[0][1:], table))
        elif line.startswith("-A ") and (
            _is_own(words[1], table) or _is_own(_target(words), table)
        ):
            lines.append((table, line))
    return State(_parts(chains, lines))


def _parts(
    chains: Iterable[tuple[str, Table]], lines: Iterable[tuple[Table, str]]
) -> dict[Table, Part]:
    chains, lines = list(chains), list(lines)
    parts = {
        table: Part(
            tuple(chain for chain, home in chains if home is table),
            tuple(line for home, line in lines if home is table),
        )
        for table in Table
    }
    return {table: part for table, part in parts.items() if part != Part()}


def _is_own(chain: str, table: Table) -> bool:
    return OWN_CHAINS.get(chain) is table


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
    # Each table changes by itself, and what is redirected must never be outside its zone.
    steers = OUTPUT_CHAIN in then.part(Table.NAT).chains
    return "".join(
        _table_transaction(table, now.part(table), then.part(table))
        for table in (Table if steers else reversed(Table))
        if now.part(table) != then.part(table)
    )


def _table_transaction(table: Table, now: Part, then: Part) -> str:
    jumps = [line for line in now.lines if not _is_own(line.split()[1], table)]
    gone = [chain for chain in now.chains if chain not in then.chains]
    return "\n".join(
        [
            f"*{table}",
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
    """Return the restore texts of sets and of both families, for a dry run."""
    states = [desired_state(pod.steering, family) for family in (IPV4, IPV6)]
    creation = sets.creation(all_sets(states), {})
    return (f"# ipset restore\n{creation}" if creation else "") + "".join(
        f"# {family.restore} --noflush\n{restore_text(pod, family)}" for family in (IPV4, IPV6)
    )
