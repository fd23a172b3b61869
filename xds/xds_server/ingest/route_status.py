"""What becomes of routes: which of two kinds has a service port, and the conditions of each."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from xds_server.conditions import (
    ACCEPTED,
    CONFLICTED,
    PARTIALLY_INVALID,
    RESOLVED_REFS,
    Condition,
    ObjectStatus,
    ParentStatus,
)
from xds_server.ingest.lastgood import Forms
from xds_server.ingest.object_status import object_status
from xds_server.ingest.reader import Item
from xds_server.ingest.routes import Attachment, RouteReader, RouteReading
from xds_server.ir import Parent, Route, RouteKind
from xds_server.memo import Memo

#: A service port and the namespace whose clients it is for: "" is every client.
Scope = tuple[Parent, str]


@dataclass(frozen=True, eq=False)
class Judged:
    """A route as it is written now, and as it is in force. If what is written is bad that is its
    last good form; if there is none, what is good of its rules, or None."""

    now: RouteReading
    force: RouteReading | None


def judge(
    item: Item, reader: RouteReader, forms: Forms, beside: tuple[object, ...]
) -> Judged | None:
    """None for a route that is not the mesh's. `beside` is what the reader looks at."""
    reading = forms.read(item, reader.read, beside)
    now = reading.value if reading.item is item else reader.read(item.again())
    force = reading.value if reading.good else None
    if not reading.good and now is not None and now.dropped:
        forms.left_out.remove(item.subject)
        force = now
    # Where not even the parents can be read now, its last good form stays, and its status.
    now = now or force
    return None if now is None else Judged(now, force)


def settle(judged: Iterable[Judged], memo: Memo) -> tuple[list[Route], list[ObjectStatus]]:
    """The routes in force and the status of all. Where GRPCRoutes and HTTPRoutes meet on a service
    port, for the same clients, only the GRPCRoutes count (GEP-1426, "Route types")."""
    judged = list(judged)
    taken = memo.value(
        frozenset(
            _scope(one.force.route, parent)
            for one in judged
            if one.force is not None and one.force.route.kind is RouteKind.GRPC
            for parent in one.force.route.parents
        )
    )
    routes = []
    for one in judged:
        if one.force is None:
            continue
        route = one.force.route
        left = tuple(p for p in route.parents if not _conflicts(route, p, taken))
        if left != route.parents:
            route = memo(_under, route, memo.value(left))
            for attachment in one.force.attachments:
                if text := _conflict(one.force.route, attachment, taken):
                    attachment.field.misfit(text)
        routes.append(route)
    return routes, [memo(_status, one.now, one.force, taken) for one in judged]


def _under(route: Route, parents: tuple[Parent, ...]) -> Route:
    return replace(route, parents=parents)


def _scope(route: Route, parent: Parent) -> Scope:
    own = route.name.namespace
    return parent, "" if own == parent.service.namespace else own


def _conflicts(route: Route, parent: Parent, taken: Collection[Scope]) -> bool:
    return route.kind is RouteKind.HTTP and _scope(route, parent) in taken


def _conflict(route: Route, attachment: Attachment, taken: Collection[Scope]) -> str:
    """What to tell of it; empty when there is none."""
    lost = [parent for parent in attachment.parents if _conflicts(route, parent, taken)]
    if not lost:
        return ""
    numbers = ", ".join(str(parent.port) for parent in lost)
    text = f"GRPCRoutes have port {numbers} of Service {lost[0].service}, and go first"
    some = len(lost) < len(attachment.parents)
    return f"{text}; accepted for its other ports" if some else text


def _status(
    now: RouteReading, force: RouteReading | None, taken: Collection[Scope]
) -> ObjectStatus:
    item = now.item
    resolved = _resolved(now)
    fallen_back = force is not None and force is not now and bool(now.dropped)
    parents = []
    for attachment in now.attachments:
        conditions = [_accepted(now, force, attachment, taken), resolved]
        if conditions[0].status and now.dropped:
            rules = ", ".join(now.dropped)
            text = f"Dropped Rule: {rules}; its requests are answered with an error"
            if fallen_back:
                text = f"Fall Back: {_why(item)}; the last good form of all rules stays in force"
            conditions.append(Condition(PARTIALLY_INVALID, True, "UnsupportedValue", text))
        parents.append(ParentStatus(attachment.reference, tuple(conditions)))
    # Of a route that fell back, what is accepted is what it was.
    told = force.item if force is not None and fallen_back else item
    return object_status(item, parents=tuple(parents), told=told)


def _accepted(
    now: RouteReading,
    force: RouteReading | None,
    attachment: Attachment,
    taken: Collection[Scope],
) -> Condition:
    if force is None or (force is not now and not now.dropped):
        reason = "IncompatibleFilters" if now.incompatible else "UnsupportedValue"
        kept = "" if force is None else "; its last good form stays in force"
        return Condition(ACCEPTED, False, reason, f"{_why(now.item)}{kept}")
    if attachment.refused:
        return Condition(ACCEPTED, False, "NoMatchingParent", attachment.refused)
    conflict = _conflict(now.route, attachment, taken)
    if conflict and all(_conflicts(now.route, parent, taken) for parent in attachment.parents):
        return Condition(ACCEPTED, False, CONFLICTED, conflict)
    return Condition(ACCEPTED, True, "Accepted", conflict)


def _why(item: Item) -> str:
    wrong = [problem for problem in item.problems if problem.own]
    first = ": ".join(part for part in (wrong[0].field, wrong[0].value, wrong[0].message) if part)
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{first}{more}"


def _resolved(reading: RouteReading) -> Condition:
    if not reading.unresolved:
        return Condition(RESOLVED_REFS, True, "ResolvedRefs")
    # Several reasons are told, the first one by its name.
    first = reading.unresolved[0].reason
    text = "; ".join(dict.fromkeys(one.message for one in reading.unresolved))
    return Condition(RESOLVED_REFS, False, first, text)
