"""What can be wrong with the objects that a user gave.

Problems are collected, never raised: one run names every one of them. What stops a command at
once (a missing directory, a node id that is none) is a `redirector.errors.InputError`.
"""

import reprlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake. `field` is a path such as `spec.rules[0].backendRefs[1].weight`, and `message`
    says the way out; a part that does not apply is empty. `own` is False where the object is well
    said and only does not fit the others there are. `suspects` are namespaces that policies may be
    for in what could not be read."""

    file: str
    object: str
    field: str
    value: str
    message: str
    own: bool = True
    suspects: frozenset[str] = frozenset()

    def __str__(self) -> str:
        parts = (self.file, self.object, self.field, self.value, self.message)
        line = " ".join(": ".join(part for part in parts if part).split())
        # Keys come from the file as they are: nothing of them may move a terminal's cursor.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shown(value: object) -> str:
    """The value as a message shows it: short, whatever was given (aliases may nest for ever)."""
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxstring, shortener.maxother = 3, 80, 80
    return shortener.repr(value)
