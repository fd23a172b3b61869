"""The status of policies: what became of each under each of its targets.

Reasons are those of the Gateway API (PolicyConditionReason).
"""

from collections.abc import Collection, Iterable, Mapping

from xds_server.conditions import ACCEPTED, Condition, ObjectStatus, ParentStatus, Reference
from xds_server.ingest.object_status import object_status
from xds_server.ingest.reader import Field, Item
from xds_server.ir import Name

TARGET_NOT_FOUND = "TargetNotFound"
_INVALID = "Invalid"


def accepted(message: str = "") -> tuple[Condition, ...]:
    return (Condition(ACCEPTED, True, "Accepted", message),)


def refused(reason: str, message: str) -> tuple[Condition, ...]:
    return (Condition(ACCEPTED, False, reason, message),)


def policy_status(
    item: Item,
    targets: Iterable[tuple[Field, tuple[Condition, ...]]] = (),
    conditions: tuple[Condition, ...] = (),
) -> ObjectStatus:
    """Conditions by target, each with its entry of targetRefs, or those of a policy without any."""
    return object_status(
        item, conditions, tuple(ParentStatus(_reference(field), found) for field, found in targets)
    )


def policy_statuses(
    items: Iterable[Item],
    attached: Iterable[ObjectStatus],
    kept: Collection[str],
    targets: Mapping[str, Collection[Name]],
) -> tuple[ObjectStatus, ...]:
    """Of all policies, given as they are now: those `attached` are known; what was `kept` in its
    last good form is told by its subject. `targets` are what an AuthorizationPolicy may be for."""
    known = {status.subject: status for status in attached}
    found = []
    for item in items:
        if item.bad:
            found.append(_invalid(item, kept))
        elif item.subject in known:
            found.append(known[item.subject])
        else:
            found.append(_aimed(item, targets))
    return tuple(sorted(found, key=lambda status: status.subject))


def _aimed(item: Item, targets: Mapping[str, Collection[Name]]) -> ObjectStatus:
    """Of an AuthorizationPolicy, which holds for what its targetRefs name, or what it selects."""
    references = item.spec["targetRefs"]
    if not references.present:
        return policy_status(item, conditions=accepted())
    found = []
    for field in references.items():
        kind, name = _text(field["kind"]), Name(item.name.namespace, _text(field["name"]))
        there = name in targets[kind]
        lack = refused(TARGET_NOT_FOUND, f"there is no {kind} {name}")
        found.append((field, accepted() if there else lack))
    return policy_status(item, found)


def _invalid(item: Item, kept: Collection[str]) -> ObjectStatus:
    """Of a policy that is bad by itself."""
    if item.subject in kept:
        instead = "its last good form stays in force"
    elif item.kind == "AuthorizationPolicy":
        instead = "everything is refused in its place"
    else:
        instead = "it has no effect"
    wrong = [problem for problem in item.problems if problem.own]
    first = f"{wrong[0].field}: {wrong[0].message}"
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    found = refused(_INVALID, f"{first}{more}; {instead}")
    entries = item.spec["targetRefs"].value if isinstance(item.spec.value, dict) else None
    named = [
        field
        for field in (item.again().spec["targetRefs"].items() if entries else [])
        if isinstance(field.value, dict) and _text(field["name"])
    ]
    if named:
        return policy_status(item, [(field, found) for field in named])
    return policy_status(item, conditions=found)


def _reference(field: Field) -> Reference:
    section = _text(field["sectionName"])
    return Reference(
        _text(field["group"]), _text(field["kind"]), None, _text(field["name"]), section or None
    )


def _text(field: Field) -> str:
    """The text, whatever is wrong with it."""
    return field.value if isinstance(field.value, str) else ""
