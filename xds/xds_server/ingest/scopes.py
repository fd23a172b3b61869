"""What a pod's sidecar is told of, and whether its application may go anywhere else: annotations of
the pod or else its namespace."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from redirector import model
from xds_server.ingest.reader import Field, Item
from xds_server.ir import Name, Scope

IMPORTS = f"{model.ANNOTATION}{model.IMPORTS}"
OUTBOUND_POLICY = f"{model.ANNOTATION}{model.OUTBOUND_POLICY}"
ALLOW_ANY, REGISTRY_ONLY = "allow-any", "registry-only"

_LABEL = "[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_IMPORT = re.compile(rf"({_LABEL})(?:/(\*|{_LABEL}))?")
_MOST = 1000


@dataclass(frozen=True)
class Wishes:
    """None where nothing is said."""

    scope: Scope | None = None
    closed: bool | None = None

    def over(self, other: "Wishes") -> "Wishes":
        """These, and where they say nothing the other ones."""
        return Wishes(
            other.scope if self.scope is None else self.scope,
            other.closed if self.closed is None else self.closed,
        )


#: Says nothing.
NOTHING = Wishes()


def parse_imports(text: str) -> Scope | str:
    """Reads `*` for everything, or `NAMESPACE` and `NAMESPACE/SERVICE`, with commas between them;
    `.` adds nothing to the own namespace. What is none of these otherwise."""
    namespaces: set[str] = set()
    services: set[Name] = set()
    entries = [entry.strip() for entry in text.split(",")]
    if len(entries) > _MOST:
        return f"more than {_MOST} entries"
    for entry in entries:
        if entry == "*":
            return Scope(everything=True)
        if entry == ".":
            continue
        found = _IMPORT.fullmatch(entry) if len(entry) < 300 else None
        if found is None:
            return entry
        namespace, service = found.groups()
        if service in (None, "*"):
            namespaces.add(namespace)
        else:
            services.add(Name(namespace, service))
    return Scope(frozenset(namespaces), frozenset(services))


def read_namespace(item: Item) -> Wishes:
    """What a Namespace wishes for its pods."""
    return _wishes(item, Field.problem)


def read_pod_wishes(item: Item) -> Wishes:
    """What a pod wishes for itself. A mistake makes it no bad pod."""
    return _wishes(item, Field.misfit)


def _wishes(item: Item, report: Callable[[Field, str], None]) -> Wishes:
    annotations = item.root["metadata"]["annotations"]
    imports, policy = annotations[IMPORTS], annotations[OUTBOUND_POLICY]
    scope, closed = None, None
    if imports.present:
        read = parse_imports(imports.value) if isinstance(imports.value, str) else "no text"
        if isinstance(read, Scope):
            scope = read
        else:
            report(
                imports,
                f"{read[:80]!r} is not '*', '.', NAMESPACE or NAMESPACE/SERVICE; name them with "
                "commas between them",
            )
    if policy.present:
        # What nobody can read is not taken for leave.
        closed = policy.value != ALLOW_ANY
        if policy.value not in (ALLOW_ANY, REGISTRY_ONLY):
            report(policy, f"must be {ALLOW_ANY} or {REGISTRY_ONLY}; until then the latter holds")
    return Wishes(scope, closed)
