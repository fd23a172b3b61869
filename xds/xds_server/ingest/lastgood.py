"""What stays in force of an object that is bad now: its last good form, if it ever had one."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from xds_server.errors import Problem
from xds_server.ingest.reader import Item, identify
from xds_server.ir import Name
from xds_server.memo import Memo, runs
from xds_server.sources.objects import KubeObject

T = TypeVar("T")

#: Kind and name.
Key = tuple[str, Name]


@dataclass(frozen=True)
class Reading(Generic[T]):
    """What an object says: as it is now, or as it was when it was last good (`item` is the form
    that was read). Of a bad one that never was good `value` is not to be used as it is."""

    item: Item
    value: T
    good: bool


@dataclass(frozen=True)
class _Good(Generic[T]):
    """What a run of objects says, and the objects, all of which are good."""

    readings: Sequence[Reading[T]]
    sources: Mapping[Key, KubeObject]


@dataclass(eq=False)
class Forms:
    """One reading of all objects. `before` are the last good forms known so far, and `good` becomes
    what is known after it: an object that is gone is not in it, unless it is asked for (`gone`)."""

    before: Mapping[Key, KubeObject]
    good: dict[Key, KubeObject] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    #: What was read when the objects were as they are still.
    memo: Memo = field(default_factory=Memo)
    _read: list[Item] = field(default_factory=list)

    def identify(self, source: KubeObject, problems: list[Problem]) -> tuple[str, Item] | None:
        """As `identify`, but an object that is still the same is the same item, too."""
        found, wrong = self.memo(_identified, source)
        if found is None:
            problems += wrong
        else:
            # What was found wrong with it beside the objects that there were then.
            found[1].problems.clear()
        return found

    def plain(
        self, run: Sequence[KubeObject], known: Collection[tuple[str, str]]
    ) -> Mapping[Key, Item] | None:
        """The objects of a run, if all say who they are, differ in that, and are of a kind that is
        known."""
        memo = self.memo
        found = memo.by((_plain, known, *run), lambda: _plain(run, known, memo))
        for item in found.values() if found else ():
            if item.problems:
                item.problems.clear()
        return found

    def read_all(self, items: Sequence[Item], reader: Callable[[Item], T]) -> list[Reading[T]]:
        """Reads objects of which a reader looks at nothing else."""
        readings: list[Reading[T]] = []
        for run in runs(items):
            good = self._good_ones(run, reader)
            if good is None:
                readings += (self.read(item, reader, ()) for item in run)
            else:
                readings += good.readings
                self.good.update(good.sources)
                self._read += run
        return readings

    def _good_ones(self, run: Sequence[Item], reader: Callable[[Item], T]) -> "_Good[T] | None":
        """What a run of objects says, if there is nothing wrong with any of them."""
        if any(item.problems for item in run):
            return None

        def read() -> _Good[T] | None:
            values = [self._remembered(item, reader, ()) for item in run]
            wrong = [item for item in run if item.problems]
            for item in wrong:
                item.problems.clear()
            if wrong:
                return None
            readings = [Reading(i, value, True) for i, value in zip(run, values, strict=True)]
            return _Good(readings, {(item.kind, item.name): item.source for item in run})

        return self.memo.by((_Good, getattr(reader, "__func__", reader), *run), read)

    def read(
        self,
        item: Item,
        reader: Callable[[Item], T],
        beside: tuple[object, ...] | None = None,
    ) -> Reading[T]:
        """Reads the object, or its last good form if it is bad. `beside` is everything else that
        the reader looks at, which is not changed but replaced when it is not the same any more:
        with the same beside it, the same object is not read again."""
        value = reader(item) if beside is None else self._remembered(item, reader, beside)
        self._read.append(item)
        key = (item.kind, item.name)
        if not item.bad:
            self.good[key] = item.source
            return Reading(item, value, True)
        former = self._former(key)
        if former is not None:
            value = reader(former)
            if not former.bad:
                self._read.append(former)
                self.good[key] = former.source
                self.kept.append(item.subject)
                return Reading(former, value, True)
        self.left_out.append(item.subject)
        return Reading(item, value, False)

    def missing_from(self, files: set[str], present: set[Key]) -> Iterator[Item]:
        """The last good forms of what stood in these files and is not there now."""
        for key, source in self.before.items():
            if source.file in files and key not in present:
                former = self._former(key)
                if former is not None:
                    self.kept.append(former.subject)
                    yield former

    def gone(self, kind: str, names: Iterable[Name]) -> Iterator[Item]:
        """The last good forms of objects that are no more; known for as long as they are asked
        for."""
        for name in sorted(names):
            source = self.before.get((kind, name))
            found = self.memo(_identified, source)[0] if source is not None else None
            if source is not None and found is not None:
                self.good[kind, name] = source
                yield found[1]

    def _remembered(self, item: Item, reader: Callable[[Item], T], beside: tuple[object, ...]) -> T:
        known = len(item.problems)
        fresh = False

        def read() -> tuple[T, tuple[Problem, ...]]:
            nonlocal fresh
            fresh = True
            value = reader(item)
            return value, tuple(item.problems[known:])

        plain = getattr(reader, "__func__", reader)
        value, problems = self.memo.by((plain, item, *beside), read)
        if not fresh:
            item.problems.extend(problems)
        return value

    @property
    def problems(self) -> list[Problem]:
        """Everything found so far, object by object."""
        return [problem for item in self._read for problem in item.problems]

    def former(self, item: Item) -> Item | None:
        """The object as it last was good, if that differs from now."""
        key = (item.kind, item.name)
        return None if self.before.get(key) is item.source else self._former(key)

    def _former(self, key: Key) -> Item | None:
        source = self.before.get(key)
        found = identify(source, []) if source is not None else None
        return found[1] if found else None


def _plain(
    run: Sequence[KubeObject], known: Collection[tuple[str, str]], memo: Memo
) -> Mapping[Key, Item] | None:
    found: dict[Key, Item] = {}
    for source in run:
        identity, _ = memo(_identified, source)
        if identity is None or (identity[0], identity[1].kind) not in known:
            return None
        item = identity[1]
        found[item.kind, item.name] = item
    return found if len(found) == len(run) else None


def _identified(source: KubeObject) -> tuple[tuple[str, Item] | None, list[Problem]]:
    problems: list[Problem] = []
    return identify(source, problems), problems


def readable(item: Item, read: Callable[[Item], object]) -> bool:
    """Whether this part of the object is good."""
    again = item.again()
    read(again)
    return not again.bad
