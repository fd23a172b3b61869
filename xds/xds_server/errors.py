"""What can be wrong with the objects that a user gave.

Problems are collected, never raised: one run names every one of them. What stops a command at
once (a missing directory, a node id that is none) is a `redirector.errors.InputError`.
"""

import reprlib
from dataclasses import dataclass

#: Of a part of a message, in characters.
_LONGEST = 1000


@dataclass(frozen=True)
class Problem:
    """One mistake. `field` is a path such as `spec.rules[0].backendRefs[1].weight`, and `message`
    says the way out; a part that does not apply is empty. `own` is False where the object is well
    said and only does not fit the others there are. `suspects` are namespaces that policies may be
    for in what could not be read; of an `opaque` file nothing could, so they may be for any."""

    file: str
    object: str
    field: str
    value: str
    message: str
    own: bool = True
    suspects: frozenset[str] = frozenset()
    opaque: bool = False

    def __str__(self) -> str:
        parts = (self.file, self.object, self.field, self.value, self.message)
        return ": ".join(printable(part) for part in parts if part)


def printable(text: str) -> str:
    """One line of bearable length. Names and keys come as they were given: nothing of them may move
    a terminal's cursor."""
    line = " ".join(text[: 2 * _LONGEST].split())
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class _Shortener(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write numbers of more than 4,300 digits.
        bits = value.bit_length()
        return super().repr_int(value, level) if bits <= 256 else f"a number of {bits} bits"


def shown(value: object) -> str:
    """The value as a message shows it: short, whatever was given (aliases may nest for ever)."""
    shortener = _Shortener()
    shortener.maxlevel, shortener.maxstring, shortener.maxother = 3, 80, 80
    return shortener.repr(value)
