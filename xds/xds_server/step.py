"""The step from one state to the next that all clients take together. Pure.

Most changes are of the content of some endpoints or routes, and most clients are up to date when
one comes: then what they are sent differs in the nonce alone, and so does what is booked for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from xds_server.exchange import Response
from xds_server.references import ENDPOINT, ROUTE, Reference
from xds_server.snapshot import Encoded, ResourceSet, Snapshot

#: Others lead to more: clusters to their endpoints, listeners to routes.
_TYPES = frozenset({ENDPOINT, ROUTE})
#: Nonces tell how many messages a client was sent; so many different ones share theirs.
_NONCES = 256


@dataclass(frozen=True)
class Step:
    """Nothing but the content of these resources changed."""

    type_url: str
    after: ResourceSet
    changed: tuple[Encoded, ...]
    #: name -> version of `changed`.
    contents: Mapping[str, str]
    #: What their versions before refer to, by name, where it is anything.
    lingering: Mapping[str, frozenset[Reference]]
    _responses: dict[tuple[type, str], Response] = field(default_factory=dict, repr=False)

    def response(self, variant: type, nonce: str, make: Callable[[], Response]) -> Response:
        """The message to clients of this variant that have come to this nonce."""
        found = self._responses.get((variant, nonce))
        if found is None:
            found = make()
            if len(self._responses) < _NONCES:
                self._responses[variant, nonce] = found
        return found


class Stride(NamedTuple):
    """A step that a client was sent: where it leads to, and what is to be answered."""

    type_url: str
    nonce: str
    to: Snapshot


def step(old: Snapshot, new: Snapshot) -> Step | None:
    """The step between them, worked out once; None if there is more to it."""
    return new.once(old.versions, lambda: _step(old, new))


def _step(old: Snapshot, new: Snapshot) -> Step | None:
    types = {*old.types, *new.types}
    differ = [url for url in types if old.of(url).version != new.of(url).version]
    if len(differ) != 1 or differ[0] not in _TYPES:
        return None
    before, after = old.of(differ[0]), new.of(differ[0])
    names = sorted(after.changed_since(before))
    if not all(name in before and name in after for name in names):
        return None
    changed = tuple(after[name] for name in names)
    contents = {entry.name: entry.version for entry in changed}
    lingering = {name: before[name].refers for name in names if before[name].refers}
    return Step(differ[0], after, changed, contents, lingering)
