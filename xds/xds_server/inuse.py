"""What a client may still be using although it is no longer desired. Pure."""

from collections.abc import Iterable, Mapping

from xds_server.references import (
    CLUSTER,
    ENDPOINT,
    FILTER,
    LISTENER,
    REFERRING,
    ROUTE,
    Reference,
)
from xds_server.snapshot import ResourceSet, Snapshot
from xds_server.typestate import TypeState

#: Which types refer to one.
_USERS = {FILTER: (LISTENER,), ROUTE: (LISTENER,), CLUSTER: (LISTENER, ROUTE), ENDPOINT: (CLUSTER,)}

#: A listener warms until these come.
WARMING = (ROUTE, FILTER)


def removable(types: Mapping[str, TypeState], type_url: str) -> list[str]:
    """What is to go of a type and nothing that the client may still have refers to."""
    stale = types[type_url].stale
    for user in _USERS.get(type_url, ()) if stale else ():
        for references in types[user].lingering.values():
            if references is None:
                return []
            stale = stale - {t.name for t in references if t.type_url == type_url}
    return sorted(stale)


def note_takeovers(types: Mapping[str, TypeState], desired: Snapshot) -> None:
    """What was replaced refers to nothing any more. All has been answered.

    A listener takes over once its routes and filters are taken, too; until then its predecessor has
    its own, also a route that the client was told is gone.
    """
    for user in REFERRING:
        state, entries = types[user], desired.of(user)
        for name in list(state.lingering):
            if user == ROUTE and name not in entries and _lingers(types[LISTENER], name):
                continue
            refers = entries[name].refers if user == LISTENER and name in entries else ()
            needs = (target for target in refers if target.type_url in WARMING)
            if state.taken(name, entries) and all(
                types[url].taken(target, desired.of(url)) for url, target in needs
            ):
                del state.lingering[name]


def _lingers(listeners: TypeState, route: str) -> bool:
    users = listeners.lingering.values()
    return any(refers is None or Reference(ROUTE, route) in refers for refers in users)


def targets(state: TypeState, desired: ResourceSet) -> Iterable[Reference]:
    """What the resources of a type refer to, but for those that the client refused."""
    if not state.doubts:
        return desired.refers
    taken = (e for e in desired.values() if not state.doubts.holds(e.name, e.version))
    return frozenset().union(*(entry.refers for entry in taken))
