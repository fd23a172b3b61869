"""What a client refused, and how the bad part of it is found. Pure.

A client that refuses a response does not say which resource was wrong, or says it in words of its
own, and applies the rest of it or nothing. So what was refused is sent again in parts: what the
error names apart from what it does not, else one half and the other; a refused part in smaller
ones. What is refused alone is quarantined: it is not sent again until its content changes. Each
refusal either makes a part smaller or ends in quarantine, so it never loops.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

#: How much of a client's error text is kept; nothing bounds what a client sends.
MAX_ERROR = 4096
#: What a resource's name may go on with; next to these a name is a part of another one.
_NAME_GOES_ON = r"[\w|/-]"


@dataclass(frozen=True)
class Quarantined:
    """A resource that one client refused on its own; `error` is the client's own text.

    The client keeps the version that it accepted last, if any.
    """

    type_url: str
    name: str
    version: str
    error: str


def named(error: str, names: Iterable[str]) -> set[str]:
    """Those of the names that the text holds as a whole."""
    return {
        name
        for name in names
        if name in error
        and re.search(rf"(?<!{_NAME_GOES_ON}){re.escape(name)}(?!{_NAME_GOES_ON})", error)
    }


class Doubts:
    """What one client refused of one type: name -> version, ABSENT for what was to go."""

    __slots__ = ("_parts", "_trial", "_trial_nonce", "quarantined")

    def __init__(self) -> None:
        #: By name; what was quarantined stays here until another version is taken.
        self.quarantined: dict[str, Quarantined] = {}
        self._parts: list[dict[str, str]] = []
        self._trial: dict[str, str] = {}
        self._trial_nonce = ""

    def __bool__(self) -> bool:
        return bool(self.quarantined or self._parts or self._trial)

    def standing(self, version_of: Callable[[str], str]) -> list[Quarantined]:
        """What is quarantined and still desired."""
        return [q for q in self.quarantined.values() if version_of(q.name) == q.version]

    @property
    def open(self) -> bool:
        """Something is to be tried again, or is being tried."""
        return bool(self._parts or self._trial)

    @property
    def trying(self) -> bool:
        """A part was sent and is not answered yet."""
        return bool(self._trial_nonce)

    @property
    def waiting(self) -> bool:
        """A part is to be sent, and no other one waits for its answer."""
        return bool(self._parts) and not self.trying

    def holds(self, name: str, version: str) -> bool:
        """Whether this version was refused, alone or together with others."""
        found = self.quarantined.get(name)
        return (
            (found is not None and found.version == version)
            or self._trial.get(name) == version
            or any(part.get(name) == version for part in self._parts)
        )

    def untried(self) -> dict[str, str]:
        """What is to be tried again and is not on its way."""
        return {name: version for part in self._parts for name, version in part.items()}

    def refuse(
        self, type_url: str, contents: Mapping[str, str], error: str, *, alone: bool
    ) -> None:
        """These were refused; `alone` tells that there was nothing else that could be wrong."""
        if alone:
            for name, version in contents.items():
                self.quarantined[name] = Quarantined(type_url, name, version, error)
        else:
            # What stood in two refused responses is tried once.
            fresh = {n: version for n, version in contents.items() if not self.holds(n, version)}
            self._parts.extend(part for part in _split(fresh, error) if part)

    def accept(self, contents: Mapping[str, str]) -> None:
        """The client took these."""
        for name in contents.keys() & self.quarantined.keys():
            del self.quarantined[name]
        self._drop(lambda name, version: contents.get(name) == version)

    def overtaken(self, version_of: Callable[[str], str]) -> set[str]:
        """Names that changed before they could be tried again; they are tried no more."""
        return self._drop(lambda name, version: version_of(name) != version)

    def _drop(self, cleared: Callable[[str, str], bool]) -> set[str]:
        dropped = set()
        for part in self._parts:
            names = [name for name, version in part.items() if cleared(name, version)]
            for name in names:
                del part[name]
            dropped.update(names)
        self._parts = [part for part in self._parts if part]
        return dropped

    def next_part(self) -> dict[str, str]:
        """What to send on its own now; empty while there is nothing, or an answer is due."""
        if not self.waiting:
            return {}
        return self._parts.pop(0)

    def on_trial(self, part: dict[str, str], nonce: str) -> None:
        """The part was sent with this nonce."""
        self._trial, self._trial_nonce = part, nonce

    def answered(self, nonce: str) -> None:
        """The client answered; what it means for the contents is told by `accept` or `refuse`."""
        if nonce == self._trial_nonce:
            self._trial, self._trial_nonce = {}, ""

    def forget(self, name: str) -> None:
        """The client lost interest in a name."""
        self.quarantined.pop(name, None)
        self._trial.pop(name, None)
        self._drop(lambda doubted, _: doubted == name)


def _split(contents: Mapping[str, str], error: str) -> list[dict[str, str]]:
    """In two, the part that is more likely good first."""
    names = sorted(contents)
    guilty = named(error, names)
    if not guilty or len(guilty) == len(names):
        guilty = set(names[len(names) // 2 :])
    return [
        {name: contents[name] for name in names if name not in guilty},
        {name: contents[name] for name in names if name in guilty},
    ]
