"""What became of an object: the conditions of its status, as Kubernetes' API conventions have them.

Pure values. Ingesting finds them, the API and `xds-server` show them; when a condition changed
(`lastTransitionTime`) is known only to whoever writes it.
"""

from dataclasses import dataclass

#: The types that the Gateway API gives to routes and policies.
ACCEPTED = "Accepted"
CONFLICTED = "Conflicted"
RESOLVED_REFS = "ResolvedRefs"
PARTIALLY_INVALID = "PartiallyInvalid"
PROGRAMMED = "Programmed"


@dataclass(frozen=True, order=True)
class Condition:
    """`reason` is one word in CamelCase, from the specification where it has one; `message` is for
    people. Kubernetes writes `status` as "True" and "False"."""

    type: str
    status: bool
    reason: str
    message: str = ""


@dataclass(frozen=True, order=True)
class Reference:
    """Another object, as the object itself names it; what it leaves out is None."""

    group: str | None
    kind: str | None
    namespace: str | None
    name: str
    section_name: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class ParentStatus:
    """A route's conditions under one of its parents (`status.parents`), or a policy's under one of
    its targets (`status.ancestors`)."""

    parent: Reference
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class ObjectStatus:
    """An object's status. A route has `parents`, one for each of its parentRefs that is the mesh's,
    in the order given; a policy has one for each of its targetRefs. What has none has `conditions`
    of its own. `generation` is what was read of the object's metadata."""

    api_version: str
    kind: str
    namespace: str
    name: str
    generation: int | None = None
    conditions: tuple[Condition, ...] = ()
    parents: tuple[ParentStatus, ...] = ()

    @property
    def subject(self) -> str:
        """As messages call it: `HTTPRoute demo/web`."""
        return f"{self.kind} {self.namespace}/{self.name}"
