"""What stands in objects' status at the API server: how conditions are written there. Pure.

A status belongs to several controllers. Ours are the entries with our controller's name, and in our
own kinds the conditions beside them; the others are left as they are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xds_server.conditions import (
    ACCEPTED,
    CONFLICTED,
    PARTIALLY_INVALID,
    PROGRAMMED,
    Condition,
    ObjectStatus,
    ParentStatus,
    Reference,
)
from xds_server.groups import GATEWAY_GROUP
from xds_server.ir import Name

#: By this name entries are known as ours (Gateway API, `RouteParentStatus.controllerName`).
CONTROLLER = "redirector.io/xds-server"
#: Types of conditions that are ours in our own kinds.
_OURS = frozenset((ACCEPTED, CONFLICTED, PARTIALLY_INVALID, PROGRAMMED))
#: What CustomResourceDefinitions allow at least.
_MAX_MESSAGE = 1024
_TOLD_BY = " (told by "
#: What a reference that leaves them out means (Gateway API, `ParentReference`).
_DEFAULTS = {"group": GATEWAY_GROUP, "kind": "Gateway"}

Json = dict[str, Any]


@dataclass(frozen=True, order=True)
class Refusal:
    """A sidecar refuses what was made of an object, for a Service or (None) altogether; `error` is
    Envoy's own text."""

    sidecar: str
    error: str
    service: Name | None = None


@dataclass(frozen=True)
class Replica:
    """This server among those that write the same statuses; `lives` tells of any by its name."""

    name: str
    lives: Callable[[str], bool]


def with_programmed(
    status: ObjectStatus, refusals: Iterable[Refusal], replica: str = ""
) -> ObjectStatus:
    """The status with a condition, wherever the object is accepted, that tells whether sidecars
    take what was made of it. `replica` is who tells, where several write the same status."""
    refusals = sorted(refusals)

    def told(
        conditions: tuple[Condition, ...], against: Sequence[Refusal]
    ) -> tuple[Condition, ...]:
        accepted = any(c.type == ACCEPTED and c.status for c in conditions)
        return (*conditions, _programmed(against, replica)) if accepted else conditions

    def concern(parent: ParentStatus) -> list[Refusal]:
        name = Name(parent.parent.namespace or status.namespace, parent.parent.name)
        is_service = parent.parent.kind == "Service"
        return [r for r in refusals if not is_service or r.service in (None, name)]

    return replace(
        status,
        conditions=told(status.conditions, refusals),
        parents=tuple(
            replace(parent, conditions=told(parent.conditions, concern(parent)))
            for parent in status.parents
        ),
    )


def _programmed(refusals: Sequence[Refusal], replica: str) -> Condition:
    if not refusals:
        return Condition(PROGRAMMED, True, "Programmed")
    first = refusals[0]
    sidecars = len({refusal.sidecar for refusal in refusals})
    others = f" and {sidecars - 1} more" if sidecars > 1 else ""
    told_by = f"{_TOLD_BY}{replica})" if replica else ""
    text = " ".join(f"refused by {first.sidecar}{others}: {first.error}".split())
    return Condition(PROGRAMMED, False, "Invalid", text[: _MAX_MESSAGE - len(told_by)] + told_by)


def patch(status: Mapping[str, Any], want: ObjectStatus | None, now: str, replica: Replica) -> Json:
    """What to merge into a status (RFC 7386), so that it says what is wanted; empty for nothing.

    `want` None: the object is not ours, and nothing of ours is to be left. `now` is RFC 3339.
    """
    writing = _Writing(want.generation if want else None, now, replica)
    changes: Json = {}
    for field, reference in (("parents", "parentRef"), ("ancestors", "ancestorRef")):
        given = _entries(status, field)
        kept = [entry for entry in given if entry.get("controllerName") != CONTROLLER]
        ours = [entry for entry in given if entry.get("controllerName") == CONTROLLER]
        wanted = want.parents if want and _field(want) == field else ()
        entries = kept + [writing.entry(parent, reference, ours) for parent in wanted]
        if entries != given:
            changes[field] = entries
    if want and _field(want) == "ancestors":
        given = _entries(status, "conditions")
        before = {entry.get("type"): entry for entry in given}
        entries = [entry for entry in given if entry.get("type") not in _OURS]
        entries += [writing.condition(c, before.get(c.type, {})) for c in want.conditions]
        if sorted(entries, key=_type) != sorted(given, key=_type):
            changes["conditions"] = entries
    return changes


def _field(want: ObjectStatus) -> str:
    """Routes have parents; policies have ancestors (GEP-713)."""
    return "parents" if want.api_version.startswith(f"{GATEWAY_GROUP}/") else "ancestors"


def _entries(status: Mapping[str, Any], field: str) -> list[Json]:
    found = status.get(field)
    return [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []


def _type(entry: Json) -> str:
    return str(entry.get("type"))


@dataclass(frozen=True)
class _Writing:
    generation: int | None
    now: str
    replica: Replica

    def entry(self, parent: ParentStatus, reference: str, ours: Sequence[Json]) -> Json:
        written = _written(parent.parent)
        before = next(
            (e for e in ours if _DEFAULTS | _as_json(e.get(reference)) == _DEFAULTS | written), {}
        )
        conditions = {entry.get("type"): entry for entry in _entries(before, "conditions")}
        return {
            reference: written,
            "controllerName": CONTROLLER,
            "conditions": [
                self.condition(c, conditions.get(c.type, {})) for c in parent.conditions
            ],
        }

    def condition(self, wanted: Condition, before: Json) -> Json:
        """As the API has it; what another server tells of its own sidecars is its own to take
        back, as long as it lives."""
        if wanted.type == PROGRAMMED and wanted.status and self._is_anothers(before):
            return before
        status = str(wanted.status)
        same = before.get("status") == status
        made = {
            "type": wanted.type,
            "status": status,
            "reason": wanted.reason,
            "message": wanted.message[:_MAX_MESSAGE],
            "lastTransitionTime": before.get("lastTransitionTime", self.now) if same else self.now,
        }
        if self.generation is not None:
            made["observedGeneration"] = self.generation
        return made

    def _is_anothers(self, before: Json) -> bool:
        if before.get("status") != "False" or before.get("observedGeneration") != self.generation:
            return False
        _, found, name = str(before.get("message", "")).rpartition(_TOLD_BY)
        name = name.removesuffix(")")
        return bool(found) and name != self.replica.name and self.replica.lives(name)


def _as_json(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _written(reference: Reference) -> Json:
    parts = {
        "group": reference.group,
        "kind": reference.kind,
        "namespace": reference.namespace,
        "name": reference.name,
        "sectionName": reference.section_name,
        "port": reference.port,
    }
    return {name: part for name, part in parts.items() if part is not None}


def lines(old: Iterable[ObjectStatus], new: Iterable[ObjectStatus]) -> list[tuple[bool, str]]:
    """What a log says of the conditions that changed: whether it is good news, and the line."""
    before = {key: condition for status in old for key, condition in flat(status)}
    after = {key: condition for status in new for key, condition in flat(status)}
    told = []
    for key, condition in after.items():
        was = before.get(key)
        good = is_good(condition)
        if was == condition or (was is None and good):
            continue
        text = f"{condition.type} is {condition.status}, {condition.reason}"
        told.append(
            (good, f"{key[0]}: {text}{': ' if condition.message else ''}{condition.message}")
        )
    for key in before.keys() - after.keys():
        if key[1] in _BAD_WHEN_TRUE:
            told.append((True, f"{key[0]}: no longer {key[1]}"))
    return told


#: Conditions that are there only when something is wrong.
_BAD_WHEN_TRUE = frozenset({CONFLICTED, PARTIALLY_INVALID})


def is_good(condition: Condition) -> bool:
    """Whether it is as it should be."""
    return condition.status == (condition.type not in _BAD_WHEN_TRUE)


def flat(status: ObjectStatus) -> Iterable[tuple[tuple[str, str], Condition]]:
    """All conditions of an object, by whose they are, in words, and their type."""
    for condition in status.conditions:
        yield (status.subject, condition.type), condition
    for parent in status.parents:
        reference = parent.parent
        port = f" port {reference.port}" if reference.port else ""
        name = f"{reference.namespace or status.namespace}/{reference.name}{port}"
        where = f"{status.subject} for {reference.kind or 'Gateway'} {name}"
        for condition in parent.conditions:
            yield (where, condition.type), condition
