"""The step from one state to the next that all clients take together. Pure.

Most changes are of the content of some endpoints or routes, and most clients are up to date when
one comes: then all are sent the same message, and the same is booked for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from xds_server.exchange import Ack, Response
from xds_server.references import ENDPOINT, ROUTE, Reference
from xds_server.snapshot import Encoded, ResourceSet, Snapshot

#: Others lead to more: clusters to their endpoints, listeners to routes.
_TYPES = frozenset({ENDPOINT, ROUTE})


class Frame(NamedTuple):
    """What the request that takes a response begins and ends with; between is what it asks for."""

    head: bytes
    tail: bytes

    def between(self, request: bytes) -> bytes | None:
        """What a request asks for, if it is framed so."""
        if not (request.startswith(self.head) and request.endswith(self.tail)):
            return None
        return request[len(self.head) : len(request) - len(self.tail)]


class Shared(NamedTuple):
    """A message that clients have in common; `number` is its nonce. `ack` takes it, and comes in a
    request of this `frame`."""

    number: int
    response: Response
    ack: Ack
    frame: Frame


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
    _messages: dict[type, Shared] = field(default_factory=dict, repr=False)

    def message(self, variant: type, last: int, make: Callable[[int], Shared]) -> Shared:
        """The message to clients of this variant; `last` is the nonce that this one has come to.

        All that a nonce has to do is to rise. So whoever is behind takes over the nonce that others
        have come to, and clients with a past of their own are sent the same bytes.
        """
        found = self._messages.get(variant)
        if found is None or found.number <= last:
            found = self._messages[variant] = make(last + 1)
        return found


class Stride(NamedTuple):
    """A step that a client was sent, and where it leads to."""

    message: Shared
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
