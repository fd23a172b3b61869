"""Results of pure functions, kept from one state of the mesh to the next. Pure."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
V = TypeVar("V", bound=Hashable)

#: Compared by value; everything else is one thing only if it is the same object.
_VALUES = (str, int, type(None))
#: How many things are taken together at a time (see `runs`).
_RUN = 32
#: Sweeping goes through everything kept: it waits until that has grown by a twentieth, and so much.
_GROWTH = 64


class _Kept:
    """A result; `of` is held so that nothing else gets the identities that it is found by. `uses`
    are the results that it was made with, `asked` is the memo that last asked for it."""

    __slots__ = ("asked", "of", "result", "uses")

    def __init__(self, of: object, asked: int) -> None:
        self.of = of
        self.asked = asked
        self.result: object = None
        self.uses: list[_Kept] = []


class _Store:
    """What a line of memos has in common."""

    def __init__(self) -> None:
        self.kept: dict[object, _Kept] = {}
        self.memos = 0
        self.sweep_at = _GROWTH

    def sweep(self, since: int) -> None:
        """Forget what no memo from `since` on asked for, and nothing that they asked for uses."""
        if len(self.kept) < self.sweep_at:
            return
        everything = list(self.kept.items())
        found = [kept for _, kept in everything if kept.asked >= since]
        seen = set(map(id, found))
        while found:
            for used in found.pop().uses:
                if id(used) not in seen:
                    seen.add(id(used))
                    found.append(used)
        for key, kept in everything:
            if id(kept) not in seen:
                del self.kept[key]
        self.sweep_at = len(self.kept) * 21 // 20 + _GROWTH


class Memo:
    """Calls functions, each only once for the same arguments.

    Arguments are told apart by identity (text and numbers by value), because comparing a service
    of a thousand endpoints costs more than most of what is made of it. So what is made anew of
    something equal is worked out again: a waste, never a mistake. The memo that comes `after`
    another knows all that it knew; what neither of them has a use for is forgotten sooner or later.
    """

    def __init__(self, after: "Memo | None" = None) -> None:
        #: How often each function was really called.
        self.made: Counter[str] = Counter()
        self._store: _Store = after._store if after else _Store()
        self._store.memos += 1
        self._number = self._store.memos
        self._store.sweep(self._number - 1)
        self._making: list[_Kept] = []

    def __call__(self, function: Callable[P, R], *arguments: P.args, **_: P.kwargs) -> R:
        """`function(*arguments)`, remembered. A method counts whatever object it is of: what it
        works out must come from its arguments alone."""
        plain = getattr(function, "__func__", function)
        return self.by((plain, *arguments), lambda: function(*arguments))  # type: ignore[call-arg]

    def by(self, parts: tuple[object, ...], make: Callable[[], R]) -> R:
        """What was made of these parts, the first of which is the function that does it."""
        key = tuple([part if isinstance(part, _VALUES) else id(part) for part in parts])
        kept = self._store.kept.get(key)
        if kept is None:
            self.made[getattr(parts[0], "__name__", "")] += 1
            kept = self._make(key, parts, make)
        return self._use(kept)  # type: ignore[return-value]

    def row(self, entries: Iterable[R]) -> tuple[R, ...]:
        """A tuple of these very objects, the same one each time."""
        found = tuple(entries)
        return self.by((_row, *found), lambda: found)

    def value(self, value: V) -> V:
        """The first of all equal values."""
        return self.under((type(value), value), lambda: value)

    def under(self, key: Hashable, make: Callable[[], R]) -> R:
        """What was first made under this key."""
        place = (_row, _Store, key)
        kept = self._store.kept.get(place)
        if kept is None:
            kept = self._make(place, key, make)
        return self._use(kept)  # type: ignore[return-value]

    def _make(self, key: object, of: object, make: Callable[[], object]) -> _Kept:
        kept = _Kept(of, self._number)
        self._making.append(kept)
        try:
            kept.result = make()
        finally:
            self._making.pop()
        self._store.kept[key] = kept
        return kept

    def _use(self, kept: _Kept) -> object:
        kept.asked = self._number
        if self._making:
            self._making[-1].uses.append(kept)
        return kept.result


def runs(things: Sequence[T]) -> Iterator[Sequence[T]]:
    """A few at a time: of what was made of a run, all can be taken over while none of it changed,
    which costs less than to ask for each."""
    return (things[at : at + _RUN] for at in range(0, len(things), _RUN))


def _row() -> None:
    """Stands for rows, whose parts are all there is to them."""
