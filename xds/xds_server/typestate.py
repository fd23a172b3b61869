"""What one client asked for, and has, of one type of resources. Pure.

A type's interest moves so (TRANSITIONS is this table as data):

    interest \\ request names  nothing        something
    UNASKED                   ALL_BY_LEGACY  NAMED         "nothing" means "*" only at first, and
    ALL_BY_LEGACY             ALL_BY_LEGACY  NAMED         only for listeners and clusters
    NAMED                     NAMED          NAMED
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType

from xds_server.exchange import Nack
from xds_server.quarantine import Doubts
from xds_server.references import REFERRING, Reference
from xds_server.sent import Sent
from xds_server.snapshot import ABSENT, EMPTY, Encoded, ResourceSet
from xds_server.step import Step

#: The version of what was sent and may not have been taken; no real one is so.
UNSURE = "?"


class Interest(Enum):
    """What a client asked of a type so far."""

    UNASKED = auto()
    ALL_BY_LEGACY = auto()
    NAMED = auto()


TRANSITIONS: Mapping[tuple[Interest, bool], Interest] = MappingProxyType(
    {
        (Interest.UNASKED, False): Interest.ALL_BY_LEGACY,
        (Interest.UNASKED, True): Interest.NAMED,
        (Interest.ALL_BY_LEGACY, False): Interest.ALL_BY_LEGACY,
        (Interest.ALL_BY_LEGACY, True): Interest.NAMED,
        (Interest.NAMED, False): Interest.NAMED,
        (Interest.NAMED, True): Interest.NAMED,
    }
)


@dataclass(slots=True)
class TypeState:
    """What one client asked for, and has, of one type."""

    type_url: str
    interest: Interest = Interest.UNASKED
    wildcard: bool = False
    #: Names asked for one by one, "*" left out; to be changed by `own_names` only.
    names: Set[str] = field(default_factory=set)
    #: Names to be told of whatever was sent before: asked for (again), or due with their cluster.
    due: set[str] = field(default_factory=set)
    #: The client waits for a response even if there is nothing in it.
    owed: bool = False
    #: name -> version that the client was sent last, or ABSENT.
    sent: Sent = field(default_factory=Sent)
    #: How often `sent` lost a name: until then, what was found in it once is in it still.
    losses: int = 0
    #: Names sent that the client has never accepted in any version.
    new: set[str] = field(default_factory=set)
    #: What versions that the client may be using still refer to although others were sent, or are
    #: held, by name; None: not known.
    lingering: dict[str, frozenset[Reference] | None] = field(default_factory=dict)
    #: Names sent once, no longer desired, still to be taken away.
    stale: set[str] = field(default_factory=set)
    #: Names whose new version waits: for what it refers to, or for the next message.
    held: set[str] = field(default_factory=set)
    #: The state that `sent`, `stale` and `held` reflect in full; None: compare name by name.
    base: ResourceSet | None = None
    last_nonce: str = ""
    #: By nonce, the responses without an answer: the type's version, and what was in them. Not
    #: the response itself, since nothing makes a client answer.
    unanswered: dict[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)
    #: What was refused, and the last refusal while any of it stands.
    doubts: Doubts = field(default_factory=Doubts)
    rejected: Nack | None = None

    def own_names(self) -> set[str]:
        """The names asked for, to be changed: not shared with any other client."""
        if not isinstance(self.names, set):
            self.names = set(self.names)
        return self.names

    def reflect(self, desired: ResourceSet) -> None:
        """`sent`, `stale` and `held` reflect this state in full now."""
        old, self.base = self.base, desired
        versions = desired.versions
        if old is None or not self.sent.follow(old.versions, versions, desired.changed_since(old)):
            self.sent.share(versions)
        if isinstance(self.names, set) and self.names == desired.names:
            self.names = desired.names

    def lacks_all(self, desired: ResourceSet) -> bool:
        """The client has nothing, knows nothing, and asked for all that there is."""
        if self.base is not None or self.sent or self.unanswered or self.rejected or self.doubts:
            return False
        if self.held or self.stale or self.new or not desired or not self.due <= desired.names:
            return False
        return self.names == desired.names or (self.wildcard and not self.names)

    def begin(self, desired: ResourceSet) -> None:
        """Everything is sent at once to a client that lacks all."""
        self.base = desired
        self.sent.begin(desired.versions)
        self.new, self.due = set(desired.names), set()
        if self.names:
            self.names = desired.names

    def has_all(self) -> bool:
        """The client was sent all that there is in `base`."""
        return self.base is not None and self.sent.reflects(self.base.versions)

    def step(self, step: Step) -> None:
        """Take this step from a level state; the client must have all."""
        self.lingering.update(step.lingering)
        self.base = step.after
        self.sent.move(step.after.versions)

    def wants(self, name: str) -> bool:
        """Whether the client asked for this name, or for all."""
        return self.wildcard or name in self.names

    @property
    def stuck(self) -> bool:
        """Something was refused, and it cannot be found out what."""
        return self.rejected is not None and not self.doubts

    def up_to_date(self, desired: ResourceSet) -> bool:
        """Nothing can have changed since `base`: spares a comparison of every name."""
        base = self.base
        if base is not desired and (base is None or base.version != desired.version):
            return False
        return not (self.due or self.owed or self.held or self.doubts.waiting)

    def level(self, desired: ResourceSet) -> bool:
        """The client took this state as far as it asked for it, and nothing waits."""
        if self.interest is Interest.UNASKED:
            return not self.due
        return (
            self.base is not None
            and self.base.version == desired.version
            and not (self.due or self.owed or self.held or self.stale or self.lingering)
            and not (self.new or self.unanswered or self.rejected or self.doubts)
        )

    def candidates(self, desired: ResourceSet) -> set[str]:
        """Names whose state may differ from what the client was sent."""
        if self.base is not None:
            names = {name for name in desired.changed_since(self.base) if self.wants(name)}
        elif self.wildcard:
            names = self.names | desired.keys() | self.sent.keys()
        else:
            names = set(self.names)
        return names | self.due | self.held

    def reconsider(self, desired: ResourceSet) -> None:
        """What was refused and changed since is as any other."""
        if self.doubts.open:
            # Whether the client took it in the end nobody knows.
            for name in self.doubts.overtaken(desired.version_of) & self.sent.keys():
                self.sent[name] = UNSURE
        self.note_doubts(desired)

    def note_doubts(self, desired: ResourceSet) -> None:
        """A refusal stands as long as something of it does."""
        if not (self.doubts.open or self.doubts.standing(desired.version_of)):
            self.rejected = None

    def outdated(self, entry: Encoded) -> bool:
        """Whether the client must be sent this resource."""
        return entry.name in self.due or self.sent.get(entry.name) != entry.version

    def has_earlier(self, name: str) -> bool:
        """Whether the client has accepted a version of it that is not gone."""
        return bool(self.sent.get(name)) and name not in self.new

    def linger(self, name: str) -> None:
        """Another version is on its way, or waits: what the one before refers to is still needed.

        To be called before `base` moves on.
        """
        version = self.sent.get(name)
        if not version or self.type_url not in REFERRING:
            return
        before = (EMPTY if self.base is None else self.base).get(name)
        if before is None or before.version != version:
            # An earlier stream's, or one that was held or refused and is reckoned in already.
            self.lingering.setdefault(name, None)
        else:
            known = self.lingering.get(name, frozenset())
            self.lingering[name] = None if known is None else known | before.refers

    def hold(self, name: str) -> None:
        """Its new version has to wait. To be called before `base` moves on."""
        self.linger(name)
        self.held.add(name)

    def book(self, entries: Iterable[Encoded]) -> None:
        """Remember what is about to be sent; what nobody asked for yet is not the client's.

        To be called before `base` moves on.
        """
        for entry in entries:
            name = entry.name
            if not self.wants(name):
                continue
            before = self.sent.get(name)
            if not before:
                self.new.add(name)
            elif before != entry.version:
                self.linger(name)
            self.sent[name] = entry.version

    def book_absent(self, names: Iterable[str], *, in_use: bool = False) -> None:
        """Remember what the client was told does not exist (any more).

        `in_use`: whether it may be using the version before all the same.
        """
        for name in names:
            self.stale.discard(name)
            self.new.discard(name)
            if not in_use:
                self.lingering.pop(name, None)
            if self.doubts:
                self.doubts.forget(name)
            if name in self.names:
                self.sent[name] = ABSENT
            else:
                self.sent.pop(name, None)
                self.losses += 1

    def accept(self, contents: Mapping[str, str]) -> None:
        """The client took a response."""
        # A new set, since one that shrinks keeps the memory of its best days.
        self.new = self.new.difference(contents)
        # What is unsure is never shared.
        for name, version in contents.items() if self.sent.differs else ():
            if self.sent.get(name) == UNSURE:
                self.sent[name] = version
        if self.doubts:
            self.doubts.accept({n: v for n, v in contents.items() if self.sent.get(n) == v})

    def taken(self, name: str, desired: ResourceSet) -> bool:
        """Whether the client, having answered everything, uses the version that it should."""
        version = desired.version_of(name)
        return self.sent.get(name, ABSENT) == version and not self.doubts.holds(name, version)

    def current(self, contents: Mapping[str, str]) -> dict[str, str]:
        """Those parts of a response that the client still wants and nothing has overtaken."""
        return {
            name: version
            for name, version in contents.items()
            if self.wants(name) and self.sent.get(name, ABSENT) == version
        }

    def forget(self, name: str) -> None:
        """The client lost interest in a name."""
        self.sent.pop(name, None)
        self.losses += 1
        self.lingering.pop(name, None)
        for names in (self.new, self.stale, self.due, self.held):
            names.discard(name)
        if self.doubts:
            self.doubts.forget(name)

    def start_wildcard(self, *, owed: bool) -> None:
        """Everything is asked for; what was sent by name stays known."""
        self.wildcard = True
        self.base = None
        self.owed = owed

    def end_wildcard(self) -> None:
        """Only what was asked for by name is left."""
        self.wildcard = False
        for name in [n for n in {*self.sent, *self.due} if n not in self.names]:
            self.forget(name)
