"""What is asked for against what is enrolled: a pure difference."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from redirector.kubernetes.desired import Rest, Verdict
from redirector.model import Accelerate, Mode, Pod, Steering


class Verb(StrEnum):
    """What is done to a pod."""

    UNENROLL = "unenroll"
    #: Its sandbox was made anew: another namespace under the same name.
    REPLACE = "replace"
    UPDATE = "update"
    REPAIR = "repair"
    ENROLL = "enroll"


@dataclass(frozen=True)
class Target:
    """A pod that was found on the node, and how it is to be steered."""

    uid: str
    cgroup: Path
    netns: Path
    netns_cookie: int
    mode: Mode
    accelerate: Accelerate
    steering: Steering


@dataclass(frozen=True)
class Action:
    """One step; `target` is there for all but the removal, and for the repair of a refused pod."""

    verb: Verb
    name: str
    why: str
    target: Target | None = None


@dataclass(frozen=True)
class Known:
    """One pod of the API server: who it is, what shall become of it, where it was found."""

    uid: str
    verdict: Verdict
    target: Target | None = None


def plan(
    pods: Mapping[str, Known],
    records: Iterable[Pod],
    populated: Collection[str],
    incomplete: Mapping[str, tuple[str, ...]],
) -> list[Action]:
    """Return what to do, removals first.

    `populated` names the records whose pods have processes: one that is gone from the API stays
    steered as long as it has some. `incomplete` says what the kernel lacks of a record. A record
    of a pod that was enrolled by hand is nobody's business here.
    """
    enrolled = {record.name: record for record in records}
    removals: list[Action] = []
    changes: list[Action] = []
    for record in enrolled.values():
        if record.uid:
            known = pods.get(record.name)
            lacking = ", ".join(incomplete.get(record.name, ()))
            action = _for_record(record, known, record.name in populated, lacking)
            if action is not None:
                (removals if action.verb is Verb.UNENROLL else changes).append(action)
    removed = {action.name for action in removals}
    for name, known in pods.items():
        if known.target is not None and (name not in enrolled or name in removed):
            changes.append(Action(Verb.ENROLL, name, "it is asked for", known.target))
    return removals + changes


def _for_record(record: Pod, known: Known | None, populated: bool, lacking: str) -> Action | None:
    if known is None:
        if populated:
            return _repair(record, None, lacking)
        return Action(Verb.UNENROLL, record.name, "the pod is gone")
    if known.uid != record.uid:
        return Action(Verb.UNENROLL, record.name, "another pod has its name")
    if isinstance(known.verdict, Rest):
        return Action(Verb.UNENROLL, record.name, known.verdict)
    target = known.target
    if target is None:
        # Refused, or not yet known, or without a process: it keeps what it has.
        return _repair(record, None, lacking)
    if (target.netns_cookie, target.cgroup) != (record.netns_cookie, record.cgroup):
        return Action(Verb.REPLACE, record.name, "its sandbox is a new one", target)
    asked = (target.mode, target.accelerate, target.steering)
    if asked != (record.mode, record.accelerate, record.steering):
        return Action(Verb.UPDATE, record.name, "something else is asked for", target)
    if target.netns != record.netns:
        return Action(Verb.UPDATE, record.name, "its first process has ended", target)
    return _repair(record, target, lacking)


def _repair(record: Pod, target: Target | None, lacking: str) -> Action | None:
    return Action(Verb.REPAIR, record.name, f"lacks {lacking}", target) if lacking else None
