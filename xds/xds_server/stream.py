"""One ADS stream as a state machine: requests in, responses out, no I/O and no clock.

Source: "xDS REST and gRPC protocol" in Envoy's API documentation.

A stream keeps, for each type, what the client asked for and which versions it was sent. The
desired state is one snapshot, replaced at will; what to send is always the difference of the
two, so a slow client skips the states in between and nothing queues up.

A type's interest moves so (TRANSITIONS is this table as data):

    interest \\ request names  nothing        something
    UNASKED                   ALL_BY_LEGACY  NAMED         "nothing" means "*" only at first, and
    ALL_BY_LEGACY             ALL_BY_LEGACY  NAMED         only for listeners and clusters
    NAMED                     NAMED          NAMED

A response moves so:

    sent --ACK--> accepted        sent --NACK--> refused (not sent again until a part changes)

Order: clusters, their endpoints right behind them, listeners, routes, then whatever else was
asked for; each is sent without waiting for an answer. What is to go (routes, clusters,
endpoints) goes last: when all is answered, nothing stands refused and every route that a
listener waits for was delivered, since until then the client may still be using it. Listeners
go together with their successors, which may want the same address.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType

from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE
from xds_server.snapshot import ABSENT, Encoded, ResourceSet, Snapshot

WILDCARD = "*"
ORDER = (CLUSTER, ENDPOINT, LISTENER, ROUTE)
REMOVAL_ORDER = (ROUTE, CLUSTER, ENDPOINT)
#: Types that know a wildcard, and whose state-of-the-world responses are always complete.
WHOLE_TYPES = frozenset({CLUSTER, LISTENER})


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


@dataclass(frozen=True)
class Ack:
    """The client applied a response."""

    type_url: str
    nonce: str


@dataclass(frozen=True)
class Nack:
    """The client refused a response, or a part of it; `error` is its own text."""

    type_url: str
    nonce: str
    version: str
    error: str


@dataclass(frozen=True)
class Response:
    """One message to the client. `body` is its encoding, ready for the wire."""

    type_url: str
    nonce: str
    version: str
    resources: tuple[Encoded, ...]
    removed: tuple[str, ...]
    body: bytes = field(repr=False)

    def versions(self) -> dict[str, str]:
        """name -> version of everything in it, ABSENT for what it takes away."""
        sent = {entry.name: entry.version for entry in self.resources}
        return sent | dict.fromkeys(self.removed, ABSENT)


@dataclass
class TypeState:
    """What one client asked for, and has, of one type."""

    type_url: str
    interest: Interest = Interest.UNASKED
    wildcard: bool = False
    #: Names asked for one by one, WILDCARD left out.
    names: set[str] = field(default_factory=set)
    #: Names to be told of whatever was sent before: asked for (again), or due with their cluster.
    due: set[str] = field(default_factory=set)
    #: The client waits for a response even if there is nothing in it.
    owed: bool = False
    #: name -> version that the client has, or ABSENT.
    sent: dict[str, str] = field(default_factory=dict)
    #: Names sent once, no longer desired, still to be taken away.
    stale: set[str] = field(default_factory=set)
    #: The state that `sent` and `stale` reflect in full; None: compare name by name.
    base: ResourceSet | None = None
    last_nonce: str = ""
    #: By nonce, the responses without an answer: the type's version, and what was in them. Not
    #: the response itself, since nothing makes a client answer.
    unanswered: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    #: The last refusal, and name -> version (or ABSENT) of what it was about.
    rejected: Nack | None = None
    refused: dict[str, str] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        """Whether the client asked for this name, or for all."""
        return self.wildcard or name in self.names

    def up_to_date(self, desired: ResourceSet) -> bool:
        """Nothing can have changed since `base`: spares a comparison of every name."""
        unchanged = self.base is not None and self.base.version == desired.version
        return unchanged and not self.due and not self.owed

    def candidates(self, desired: ResourceSet) -> set[str]:
        """Names whose state may differ from what the client was sent."""
        if self.base is not None:
            names = {name for name in desired.changed_since(self.base) if self.wants(name)}
        elif self.wildcard:
            names = self.names | desired.keys() | self.sent.keys()
        else:
            names = set(self.names)
        return names | self.due

    def reconsider(self, desired: ResourceSet) -> None:
        """When a part of what was refused changes, the rest is due again.

        A client may apply the good parts of a response or none, and does not say which.
        """
        if any(desired.version_of(name) != version for name, version in self.refused.items()):
            self.due.update(self.refused)
            self.refused.clear()

    def outdated(self, entry: Encoded) -> bool:
        """Whether the client must be sent this resource."""
        return entry.name in self.due or self.sent.get(entry.name) != entry.version

    def book(self, entries: Iterable[Encoded]) -> None:
        """Remember what was sent; resources that nobody asked for yet are not the client's."""
        self.sent.update((e.name, e.version) for e in entries if self.wants(e.name))

    def book_absent(self, names: Iterable[str]) -> None:
        """Remember what the client was told does not exist (any more)."""
        for name in names:
            self.stale.discard(name)
            if name in self.names:
                self.sent[name] = ABSENT
            else:
                self.sent.pop(name, None)

    def forget(self, name: str) -> None:
        """The client lost interest in a name."""
        self.sent.pop(name, None)
        self.stale.discard(name)
        self.due.discard(name)
        self.refused.pop(name, None)

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


class Stream(ABC):
    """What both variants share: order, nonces, answers and the wait before removals."""

    def __init__(self) -> None:
        self._types: dict[str, TypeState] = {url: TypeState(url) for url in ORDER}
        self._desired: Snapshot | None = None
        self._nonces = 0
        #: The client came with resources from an earlier stream.
        self._resumed = False
        self._drained = True

    def offer(self, snapshot: Snapshot) -> None:
        """Set the state that the client should come to; replaces what was offered before."""
        self._desired = snapshot
        self._drained = False

    @property
    def rejected(self) -> tuple[Nack, ...]:
        """What the client refused and nothing has taken the place of, by type."""
        return tuple(t.rejected for t in self._types.values() if t.rejected and t.refused)

    @property
    def settled(self) -> bool:
        """Nothing is left to send, and the client answered all that was sent."""
        return (
            self._drained
            and not self._unanswered
            and (bool(self.rejected) or self._routes_delivered())
        )

    def kept(self) -> dict[str, int]:
        """How many names are kept for the client, by type."""
        return {url: max(len(t.names), len(t.sent)) for url, t in self._types.items()}

    @property
    def unanswered(self) -> int:
        """How many responses the client owes an answer."""
        return sum(len(state.unanswered) for state in self._types.values())

    def next_response(self) -> Response | None:
        """The next message to send, or None while there is nothing to say."""
        if self._desired is None:
            return None
        for state in self._types.values():
            desired = self._desired.of(state.type_url)
            if state.interest is Interest.UNASKED or state.up_to_date(desired):
                continue
            state.reconsider(desired)
            if response := self._update(state, desired):
                return response
        if self._may_remove():
            for type_url in (*REMOVAL_ORDER, *self._others()):
                state = self._types[type_url]
                if state.stale:
                    return self._remove(state, self._desired.of(type_url))
        self._drained = True
        return None

    @property
    def _unanswered(self) -> bool:
        return any(state.unanswered for state in self._types.values())

    def _others(self) -> Iterable[str]:
        return [url for url in self._types if url not in ORDER]

    def _may_remove(self) -> bool:
        return not self._unanswered and not self.rejected and self._routes_delivered()

    def _routes_delivered(self) -> bool:
        """Every route that the client's listeners name has been sent, if there is one.

        A listener takes over from its predecessor only with its route; Envoy asks for it after
        the listener's ACK, so an answered stream alone does not say that it has come this far.
        """
        listeners = self._types[LISTENER]
        if self._desired is None:
            return True
        if listeners.interest is Interest.UNASKED:
            # Back after a reconnect: its listeners and routes may still use what is to go.
            # None desired is no reason to hurry: those it has go first.
            return not self._resumed
        if not listeners.wildcard:
            return True
        routes, sent = self._desired.of(ROUTE), self._types[ROUTE].sent
        return all(
            target.name in sent or target.name not in routes
            for target in self._desired.of(LISTENER).refers
            if target.type_url == ROUTE
        )

    def _state(self, type_url: str) -> TypeState:
        return self._types.setdefault(type_url, TypeState(type_url))

    def _ask(self, state: TypeState, *, names_something: bool, owed: bool) -> None:
        """Move a type's interest along the table in this module's docstring."""
        before = state.interest
        state.interest = TRANSITIONS[before, names_something]
        if before is Interest.UNASKED and not names_something and state.type_url in WHOLE_TYPES:
            state.start_wildcard(owed=owed)

    def _answer(self, state: TypeState, nonce: str, error: str | None) -> Ack | Nack | None:
        """Book an ACK (`error` is None) or a NACK; None when no response of ours is meant."""
        found = state.unanswered.pop(nonce, None)
        if found is None:
            return None
        version, contents = found
        if error is None:
            for name in contents:
                state.refused.pop(name, None)
            return Ack(state.type_url, nonce)
        state.refused.update(
            (name, content) for name, content in contents.items() if state.wants(name)
        )
        state.rejected = Nack(state.type_url, nonce, version, error)
        if self._desired is not None:
            # What was refused may have been overtaken meanwhile.
            state.reconsider(self._desired.of(state.type_url))
        return state.rejected

    def _emit(
        self,
        state: TypeState,
        version: str,
        resources: Iterable[Encoded],
        removed: Iterable[str] = (),
    ) -> Response:
        self._nonces += 1
        nonce = str(self._nonces)
        chosen, gone = tuple(resources), tuple(removed)
        state.last_nonce = nonce
        state.owed = False
        body = self._encode(state.type_url, nonce, version, chosen, gone)
        response = Response(state.type_url, nonce, version, chosen, gone, body)
        state.unanswered[nonce] = (version, response.versions())
        return response

    def _send_endpoints_of(self, clusters: Iterable[Encoded]) -> None:
        """A cluster that is new or changed stays warming until its endpoints come (again).

        Envoy asks for those of a new cluster only, and a route may follow right behind. After a
        reconnect it may ask for them later and say that it has them: they are due all the same.
        """
        if self._desired is not None:
            served = self._desired.of(ENDPOINT)
            targets = (target for cluster in clusters for target in cluster.refers)
            self._types[ENDPOINT].due.update(
                t.name for t in targets if t.type_url == ENDPOINT and t.name in served
            )

    @abstractmethod
    def _update(self, state: TypeState, desired: ResourceSet) -> Response | None:
        """What is new, changed or asked for of one type."""

    @abstractmethod
    def _remove(self, state: TypeState, desired: ResourceSet) -> Response:
        """Takes away what is stale of one type."""

    @abstractmethod
    def _encode(
        self,
        type_url: str,
        nonce: str,
        version: str,
        resources: tuple[Encoded, ...],
        removed: tuple[str, ...],
    ) -> bytes:
        """The message as bytes."""
