"""What one sidecar should have: immutable, versioned by content, encoded once. Pure.

A resource's version is the hash of its deterministic encoding, so two servers, or one before
and after a restart, give unchanged content the same version and send none of it again.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from types import MappingProxyType

from envoy.service.discovery.v3.discovery_pb2 import (
    DeltaDiscoveryResponse,
    DiscoveryResponse,
    Resource,
)
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from xds_server.references import Reference, references

_DIGEST_BYTES = 8
#: The version of a resource that does not exist.
ABSENT = ""


def _digest(parts: Iterable[bytes]) -> str:
    state = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(4, "big"))
        state.update(part)
    return state.hexdigest()


@dataclass(frozen=True)
class Encoded:
    """One resource in its wire form. `body` is the message, `version` its content's hash (hex)."""

    type_url: str
    name: str
    version: str
    body: bytes = field(repr=False)
    refers: frozenset[Reference] = field(default=frozenset(), repr=False)

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
    names = sorted((entry.name, entry.version) for entry in entries)
    return _digest(part.encode() for pair in names for part in pair)


class ResourceSet(Mapping[str, Encoded]):
    """All resources of one type for a sidecar, by name; never changed once made."""

    def __init__(self, entries: Mapping[str, Encoded]) -> None:
        self._entries = MappingProxyType(dict(entries))
        self.version = set_version(self._entries.values())
        self._changes: dict[str, frozenset[str]] = {}
        self._dangling: dict[tuple[str, str], frozenset[str]] = {}

    def __getitem__(self, name: str) -> Encoded:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def dangling(self, type_url: str, targets: "ResourceSet") -> frozenset[str]:
        """Names of that type which a resource here refers to and `targets` lacks; remembered."""
        key = (type_url, targets.version)
        known = self._dangling.get(key)
        if known is None:
            names = {target.name for target in self.refers if target.type_url == type_url}
            known = self._dangling[key] = frozenset(names - targets.keys())
        return known

    @cached_property
    def refers(self) -> frozenset[Reference]:
        """Everything that any resource of this set names."""
        return frozenset().union(*(entry.refers for entry in self._entries.values()))

    def version_of(self, name: str) -> str:
        """A resource's version, or ABSENT."""
        entry = self._entries.get(name)
        return entry.version if entry else ABSENT

    @cached_property
    def kinds_named(self) -> frozenset[str]:
        """The types that any resource of this set refers to."""
        return frozenset(target.type_url for target in self.refers)

    def changed_since(self, old: "ResourceSet") -> frozenset[str]:
        """Names added, removed or changed from `old` to this set.

        Remembered, since every sidecar that shares both sets asks the same question.
        """
        known = self._changes.get(old.version)
        if known is None:
            names = self._entries.keys() | old._entries.keys()
            known = frozenset(n for n in names if self.version_of(n) != old.version_of(n))
            self._changes[old.version] = known
        return known


EMPTY = ResourceSet({})


@dataclass(frozen=True)
class Snapshot:
    """The resources that one sidecar should have, by type."""

    types: Mapping[str, ResourceSet]

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

    A message is recognized by identity, so what `translate` shares between sidecars is encoded
    once; equal content becomes the same Encoded object and the same ResourceSet. One encoder
    serves one state of the mesh and holds its messages, so an identity stays true.
    """

    def __init__(self) -> None:
        #: How many messages were serialized; stays put while sidecars only share.
        self.encodings = 0
        self._messages: dict[int, tuple[Message, Encoded]] = {}
        self._contents: dict[tuple[str, str, str], Encoded] = {}
        self._mappings: dict[int, tuple[Mapping[str, Message], ResourceSet]] = {}
        self._sets: dict[tuple[str, str], ResourceSet] = {}

    def snapshot(self, resources: Mapping[str, Mapping[str, Message]]) -> Snapshot:
        """`resources` as translate() gives them: type URL -> name -> message."""
        return Snapshot(
            MappingProxyType({url: self._set(url, named) for url, named in resources.items()})
        )

    def _set(self, type_url: str, named: Mapping[str, Message]) -> ResourceSet:
        seen = self._mappings.get(id(named))
        if seen is not None:
            return seen[1]
        fresh = ResourceSet({n: self._encode(type_url, n, m) for n, m in named.items()})
        entries = self._sets.setdefault((type_url, fresh.version), fresh)
        self._mappings[id(named)] = (named, entries)
        return entries

    def _encode(self, type_url: str, name: str, message: Message) -> Encoded:
        seen = self._messages.get(id(message))
        if seen is not None and (seen[1].type_url, seen[1].name) == (type_url, name):
            return seen[1]
        body = message.SerializeToString(deterministic=True)
        self.encodings += 1
        version = _digest((body,))
        encoded = self._contents.get((type_url, name, version))
        if encoded is None:
            encoded = Encoded(type_url, name, version, body, references(message))
            self._contents[(type_url, name, version)] = encoded
        self._messages[id(message)] = (message, encoded)
        return encoded
