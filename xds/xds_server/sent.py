"""What one client was sent, in memory that clients have in common. Pure."""

from collections.abc import Iterator, Mapping, MutableMapping, Set
from types import MappingProxyType

#: How many differences from what is shared are kept before it is looked for something nearer; twice
#: as many as the last time, then.
_FEW = 1
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Sent(MutableMapping[str, str]):
    """name -> version, of one type and client.

    Most clients have most of the time what they should have. So it is kept as the versions that a
    set has, which all its clients share, and the client's own differences from them: a thousand
    clients of a thousand resources would otherwise keep a million names.
    """

    __slots__ = ("_look_at", "_own", "_shared", "_size")

    def __init__(self) -> None:
        self._shared = _NOTHING
        #: None stands for a name that is shared and not this client's.
        self._own: dict[str, str | None] = {}
        self._size = 0
        self._look_at = _FEW

    def reflects(self, versions: Mapping[str, str]) -> bool:
        """These are shared, and nothing differs from them."""
        return self._shared is versions and not self._own

    @property
    def differs(self) -> bool:
        """Something differs from what is shared."""
        return bool(self._own)

    def begin(self, versions: Mapping[str, str]) -> None:
        """Share these, and forget all that there was."""
        self._shared, self._own, self._size = versions, {}, len(versions)

    def move(self, versions: Mapping[str, str]) -> None:
        """From what is shared to these, which have the same names; nothing may differ."""
        self._shared = versions

    def follow(
        self, before: Mapping[str, str], after: Mapping[str, str], changed: Set[str]
    ) -> bool:
        """Share what came `after`, if that is what is kept and what came `before` is shared;
        `changed` are the names that differ between them."""
        if self._shared is not before or len(after) != self._size:
            return False
        if not all(self.get(name) == after.get(name) for name in {*changed, *self._own}):
            return False
        self._shared, self._own = after, {}
        return True

    def share(self, versions: Mapping[str, str]) -> None:
        """Keep these, which never change, instead of the same of our own, if it is worth while."""
        if len(self._own) < self._look_at:
            return
        if len(versions) == self._size and all(self.get(n) == v for n, v in versions.items()):
            self._shared = versions
            self._own = {}
        self._look_at = max(_FEW, 2 * len(self._own))

    def __getitem__(self, name: str) -> str:
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def get(self, key: str, default: str | None = None) -> str | None:  # type: ignore[override]
        if key in self._own:
            found = self._own[key]
            return default if found is None else found
        return self._shared.get(key, default)

    def __contains__(self, name: object) -> bool:
        if name in self._own:
            return self._own[str(name)] is not None
        return name in self._shared

    def __setitem__(self, name: str, version: str) -> None:
        self._size += name not in self
        if self._shared.get(name) == version:
            self._own.pop(name, None)
        else:
            self._own[name] = version

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._size -= 1
        if name in self._shared:
            self._own[name] = None
        else:
            del self._own[name]

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._shared if name not in self._own)
        yield from (name for name, version in self._own.items() if version is not None)

    def __len__(self) -> int:
        return self._size
