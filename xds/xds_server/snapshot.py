"""What one sidecar should have: immutable, versioned by content, encoded once. Pure.

A resource's version is the hash of its deterministic encoding, so two servers, or one before
and after a restart, give unchanged content the same version and send none of it again.
"""

from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from types import MappingProxyType
from typing import TypeVar

from envoy.service.discovery.v3.discovery_pb2 import (
    DeltaDiscoveryResponse,
    DiscoveryResponse,
    Resource,
)
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from xds_server.memo import Memo
from xds_server.references import Reference, references

K = TypeVar("K")
V = TypeVar("V")

_DIGEST_BYTES = 8
_MARKS = 1 << 8 * _DIGEST_BYTES
#: Of how many other sets a set remembers how it differs from them.
_REMEMBERED = 16
#: The version of a resource that does not exist.
ABSENT = ""


def _digest(parts: Iterable[bytes]) -> str:
    state = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(4, "big"))
        state.update(part)
    return state.hexdigest()


def content_version(body: bytes) -> str:
    """The version of a resource with this encoding."""
    return _digest((body,))


@dataclass(frozen=True)
class Encoded:
    """One resource in its wire form. `body` is the message, `version` its content's hash (hex)."""

    type_url: str
    name: str
    version: str
    body: bytes = field(repr=False)
    refers: frozenset[Reference] = field(default=frozenset(), repr=False)

    @cached_property
    def mark(self) -> int:
        """Stands for name and version in the sum that is the version of a set."""
        digest = blake2b(f"{self.name}\0{self.version}".encode(), digest_size=_DIGEST_BYTES)
        return int.from_bytes(digest.digest(), "big")

    @cached_property
    def delta_frame(self) -> bytes:
        """This resource as field 2 of a DeltaDiscoveryResponse.

        Encoded protobuf messages merge by concatenation, so a response is its head plus the
        frames of its resources and no resource is encoded again for another client.
        """
        wrapped = Resource(name=self.name, version=self.version, resource=self._any())
        frame: bytes = DeltaDiscoveryResponse(resources=[wrapped]).SerializeToString()
        return frame

    @cached_property
    def sotw_frame(self) -> bytes:
        """This resource as field 2 of a DiscoveryResponse."""
        frame: bytes = DiscoveryResponse(resources=[self._any()]).SerializeToString()
        return frame

    def _any(self) -> Any:
        return Any(type_url=self.type_url, value=self.body)


def set_version(entries: Iterable[Encoded]) -> str:
    """The version of a set of resources of one type, whatever their order."""
    return version_of_marks(sum(entry.mark for entry in entries))


def version_of_marks(marks: int) -> str:
    """The version of what has these marks in sum."""
    return f"{marks % _MARKS:0{_DIGEST_BYTES * 2}x}"


class ResourceSet(Mapping[str, Encoded]):
    """All resources of one type for a sidecar, by name; never changed once made."""

    def __init__(self, entries: Mapping[str, Encoded]) -> None:
        self._entries = MappingProxyType(dict(entries))
        self.mark = sum(entry.mark for entry in self._entries.values())
        self.version = version_of_marks(self.mark)
        self._changes: dict[str, frozenset[str]] = {}
        self._dangling: dict[tuple[str, str], frozenset[str]] = {}

    def __getitem__(self, name: str) -> Encoded:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # Mapping's own ask for an item and catch the error, for each name.
    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def keys(self) -> KeysView[str]:
        return self._entries.keys()

    def dangling(self, type_url: str, targets: "ResourceSet") -> frozenset[str]:
        """Names of that type which a resource here refers to and `targets` lacks; remembered."""
        key = (type_url, targets.version)
        known = self._dangling.get(key)
        if known is None:
            known = frozenset(self.names_of(type_url) - targets.keys())
            _remember(self._dangling, key, known)
        return known

    def names_of(self, type_url: str) -> frozenset[str]:
        """Names of that type which any resource here refers to."""
        return self._named.get(type_url, frozenset())

    @cached_property
    def _named(self) -> dict[str, frozenset[str]]:
        names: dict[str, set[str]] = {}
        for target in self.refers:
            names.setdefault(target.type_url, set()).add(target.name)
        return {type_url: frozenset(found) for type_url, found in names.items()}

    def marks_of(self, type_url: str) -> Mapping[str, int]:
        """Name of that type -> the sum of the marks of those here that refer to it."""
        return self._marks_of.get(type_url, {})

    @cached_property
    def _marks_of(self) -> dict[str, dict[str, int]]:
        marks: dict[str, dict[str, int]] = {}
        for entry in self._entries.values():
            for target in entry.refers:
                of = marks.setdefault(target.type_url, {})
                of[target.name] = of.get(target.name, 0) + entry.mark
        return marks

    @cached_property
    def refers(self) -> frozenset[Reference]:
        """Everything that any resource of this set names."""
        return frozenset().union(*(entry.refers for entry in self._entries.values()))

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all."""
        return frozenset(self._entries)

    @cached_property
    def versions(self) -> Mapping[str, str]:
        """name -> version of all."""
        return MappingProxyType({name: entry.version for name, entry in self._entries.items()})

    @cached_property
    def in_order(self) -> tuple[Encoded, ...]:
        """All, by name."""
        return tuple(self._entries[name] for name in sorted(self._entries))

    @cached_property
    def delta_frames(self) -> bytes:
        """All resources as they stand in a DeltaDiscoveryResponse."""
        return b"".join(entry.delta_frame for entry in self.in_order)

    def version_of(self, name: str) -> str:
        """A resource's version, or ABSENT."""
        entry = self._entries.get(name)
        return entry.version if entry else ABSENT

    @cached_property
    def kinds_named(self) -> frozenset[str]:
        """The types that any resource of this set refers to."""
        return frozenset(self._named)

    def changed_since(self, old: "ResourceSet") -> frozenset[str]:
        """Names added, removed or changed from `old` to this set.

        Remembered, since every sidecar that shares both sets asks the same question.
        """
        known = self._changes.get(old.version)
        if known is None:
            theirs = old._entries
            changed = {name for name, entry in self._entries.items() if _differs(entry, theirs)}
            known = frozenset(changed | (theirs.keys() - self._entries.keys()))
            _remember(self._changes, old.version, known)
        return known


def _differs(entry: Encoded, others: Mapping[str, Encoded]) -> bool:
    other = others.get(entry.name)
    # Sets of one encoder share what they have in common.
    return other is not entry and (other is None or other.version != entry.version)


def _remember(answers: dict[K, V], key: K, answer: V) -> None:
    """A set that never changes is asked about each state of those that do: the oldest go."""
    if len(answers) >= _REMEMBERED:
        del answers[next(iter(answers))]
    answers[key] = answer


EMPTY = ResourceSet({})


@dataclass(frozen=True)
class Snapshot:
    """The resources that one sidecar should have, by type."""

    types: Mapping[str, ResourceSet]
    _answers: dict[tuple[str, ...], object] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def versions(self) -> tuple[str, ...]:
        """Tells its content: types and the versions of their sets."""
        return tuple(part for url in sorted(self.types) for part in (url, self.types[url].version))

    def once(self, key: tuple[str, ...], answer: Callable[[], V]) -> V:
        """What was first answered for this key, if that is remembered."""
        if key not in self._answers:
            _remember(self._answers, key, answer())
        return self._answers[key]  # type: ignore[return-value]

    def of(self, type_url: str) -> ResourceSet:
        """The resources of a type; empty for a type that we do not serve."""
        return self.types.get(type_url, EMPTY)

    def consistent(self) -> tuple[str, ...]:
        """Every reference that leads nowhere, one line each; () when the snapshot is whole."""
        lines = []
        for type_url, entries in self.types.items():
            lacking = {(k, n) for k in entries.kinds_named for n in entries.dangling(k, self.of(k))}
            for entry in entries.values() if lacking else ():
                lines += [
                    f"{Reference(type_url, entry.name)} names {target}, which is not there"
                    for target in entry.refers
                    if target in lacking
                ]
        return tuple(sorted(lines))


class Encoder:
    """Builds the snapshots of many sidecars from messages and sets that they share.

    Messages and mappings are recognized by identity, so what `translate` shares between sidecars,
    and carries over from the state before (`after`), is encoded once; equal content becomes the
    same Encoded object and the same ResourceSet.
    """

    def __init__(self, after: "Encoder | None" = None) -> None:
        self._memo: Memo = Memo(after._memo if after else None)

    @property
    def encodings(self) -> int:
        """How many messages were serialized; stays put while sidecars only share."""
        return self._memo.made["_encoded"]

    def snapshot(self, resources: Mapping[str, Mapping[str, Message]]) -> Snapshot:
        """`resources` as translate() gives them: type URL -> name -> message."""
        return self._memo(self._snapshot, resources)

    def _snapshot(self, resources: Mapping[str, Mapping[str, Message]]) -> Snapshot:
        sets = {url: self._memo(self._set, url, named) for url, named in resources.items()}
        return Snapshot(MappingProxyType(sets))

    def _set(self, type_url: str, named: Mapping[str, Message]) -> ResourceSet:
        entries = {n: self._memo(self._encoded, type_url, n, m) for n, m in named.items()}
        version = set_version(entries.values())
        return self._memo.under((type_url, version), lambda: ResourceSet(entries))

    def _encoded(self, type_url: str, name: str, message: Message) -> Encoded:
        body = message.SerializeToString(deterministic=True)
        version = content_version(body)
        return self._memo.under(
            (type_url, name, version),
            lambda: Encoded(type_url, name, version, body, references(message)),
        )
