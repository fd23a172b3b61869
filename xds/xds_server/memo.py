"""Results of pure functions, kept from one state of the mesh to the next. Pure."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V", bound=Hashable)

#: Compared by value; everything else is one thing only if it is the same object.
_VALUES = (str, int, type(None))


class Memo:
    """Calls functions, each only once for the same arguments.

    Arguments are told apart by identity (text and numbers by value), because comparing a service
    of a thousand endpoints costs more than most of what is made of it. So what is made anew of
    something equal is worked out again: a waste, never a mistake. A memo holds what it was asked
    for; the one that comes `after` it takes from it what is asked for again, and leaves the rest.
    """

    def __init__(self, after: "Memo | None" = None) -> None:
        #: How often each function was really called.
        self.made: Counter[str] = Counter()
        self._kept: dict[tuple[object, ...], tuple[object, object]] = {}
        self._before = after._kept if after else {}
        self._values: dict[object, object] = {}
        self._values_before = after._values if after else {}

    def __call__(self, function: Callable[P, R], *arguments: P.args, **_: P.kwargs) -> R:
        """`function(*arguments)`, remembered. A method counts whatever object it is of: what it
        works out must come from its arguments alone."""
        plain = getattr(function, "__func__", function)
        key = (plain, *(a if isinstance(a, _VALUES) else id(a) for a in arguments))
        kept = self._kept.get(key)
        if kept is None:
            kept = self._before.get(key)
            if kept is None:
                # The arguments are held, so that nothing else gets their identity.
                kept = (arguments, function(*arguments))  # type: ignore[call-arg]
                self.made[function.__name__] += 1
            self._kept[key] = kept
        return kept[1]  # type: ignore[return-value]

    def row(self, entries: Iterable[R]) -> tuple[R, ...]:
        """A tuple of these very objects, the same one each time."""
        return self(_row, *entries)

    def value(self, value: V) -> V:
        """The first of all equal values."""
        return self.under((type(value), value), lambda: value)

    def under(self, key: Hashable, make: Callable[[], R]) -> R:
        """What was first made under this key."""
        found = self._values.get(key)
        if found is None:
            found = self._values_before.get(key)
            self._values[key] = found = make() if found is None else found
        return found  # type: ignore[return-value]


def _row(*entries: R) -> tuple[R, ...]:
    return entries
