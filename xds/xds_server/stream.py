"""One ADS stream as a state machine: requests in, responses out, no I/O and no clock.

Source: "xDS REST and gRPC protocol" in Envoy's API documentation.

A stream keeps, for each type, what the client asked for and which versions it was sent. The
desired state is one snapshot, replaced at will; what to send is always the difference of the
two, so a slow client skips the states in between and nothing queues up.

A response moves so:

    sent --ACK--> accepted        sent --NACK--> sent again in parts --> accepted, quarantined

Order: clusters, their endpoints right behind them, listeners, routes, listeners' filters, then
whatever else was asked for; each is sent without waiting for an answer, but for routes: one that
the client has in an earlier version goes once the client has taken the clusters that are new in it.
What is to go (routes, clusters, endpoints) goes last: when all is answered and every route that a
listener waits for was delivered, since until then the client may still be using it. Listeners go
together with their successors, which may want the same address.

What the client refuses stays with the client in the version before, and so does whatever that
version refers to.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from xds_server.exchange import Ack, Nack, Response
from xds_server.inuse import WARMING, note_takeovers, removable, targets
from xds_server.quarantine import MAX_ERROR, Quarantined
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE
from xds_server.snapshot import Encoded, ResourceSet, Snapshot
from xds_server.standing import Sync
from xds_server.step import Frame, Shared, Step, Stride, step
from xds_server.typestate import TRANSITIONS, UNSURE, Interest, TypeState

WILDCARD = "*"
#: gRPC's clients refuse messages above 4 MiB unless told otherwise.
MAX_RESPONSE_BYTES = 3 << 20
#: Room for a message's own fields, and for what comes with each name in it.
HEAD_BYTES, _NAME = 512, 6
ORDER = (CLUSTER, ENDPOINT, LISTENER, ROUTE, FILTER)
REMOVAL_ORDER = (FILTER, ROUTE, CLUSTER, ENDPOINT)
#: Types that know a wildcard, and whose state-of-the-world responses are always complete.
WHOLE_TYPES = frozenset({CLUSTER, LISTENER})


class Stream(ABC):
    """What both variants share: order, nonces, answers and the wait before removals."""

    def __init__(self, limit: int = MAX_RESPONSE_BYTES, only: str = "") -> None:
        """A message holds at most `limit` bytes; `only` is the type of a stream that serves one."""
        self.only = only
        self._limit = limit
        self._types: dict[str, TypeState] = {url: TypeState(url) for url in ORDER}
        self._desired: Snapshot | None = None
        self._nonces = 0
        #: The client came with resources from an earlier stream.
        self._resumed = False
        #: A type in which a client that has everything can be answered with nothing.
        self._greeting: TypeState | None = None
        #: Listeners, routes, filters and the losses of these two at which all was found sent.
        self._delivered: tuple[ResourceSet, ResourceSet, ResourceSet, int] | None = None
        #: Nothing is left to say since the last request and the last offer.
        self._drained = True
        #: How many responses are not answered.
        self.unanswered = 0
        #: The state that the client took and that nothing is left of, or the step that leads there.
        self._level: Snapshot | None = None
        self._stride: Stride | None = None

    def offer(self, snapshot: Snapshot) -> None:
        """Set the state that the client should come to; replaces what was offered before."""
        self._desired = snapshot
        self._drained = False

    @property
    def rejected(self) -> tuple[Nack, ...]:
        """The last refusal of each type of which something still stands refused."""
        return tuple(t.rejected for t in self._types.values() if t.rejected)

    @property
    def quarantined(self) -> tuple[Quarantined, ...]:
        """What the client refused on its own, and keeps in an earlier version or not at all."""
        return tuple(
            found
            for url, state in self._types.items()
            if self._desired is not None and state.doubts
            for found in state.doubts.standing(self._desired.of(url).version_of)
        )

    def stuck(self, type_url: str) -> bool:
        """The client refused all that it was sent of a type, and it may not be tried in parts."""
        return type_url in self._types and self._types[type_url].stuck

    def took(self, what: Quarantined) -> bool:
        """The client took this very version, as far as it says."""
        state = self._types.get(what.type_url)
        return (
            state is not None
            and state.sent.get(what.name) == what.version
            and not state.doubts.holds(what.name, what.version)
            and not any(what.name in contents for _, contents in state.unanswered.values())
        )

    @property
    def level(self) -> bool:
        """The client took what was offered, and nothing of the way there is left to be known: it
        may take the next step together with all others."""
        return self._level is not None and self._level is self._desired

    @property
    def awaits(self) -> bool:
        """There is nothing to say until the client answers, or asks, or something changes."""
        return self._drained and self.unanswered > 0

    @property
    def settled(self) -> bool:
        """Nothing is left to send, and the client answered all that was sent."""
        if self.level:
            return True
        return (
            self._drained
            and not self.unanswered
            and (bool(self.rejected) or self._routes_delivered())
        )

    @property
    def offered(self) -> int:
        """How many resources there are for the client."""
        return sum(map(len, self._desired.types.values())) if self._desired else 0

    def kept(self) -> dict[str, int]:
        """How many names are kept for the client, by type."""
        return {url: max(len(t.names), len(t.sent)) for url, t in self._types.items()}

    def sync(self, type_url: str) -> Sync:
        """How what the client has of a type compares with what it should have."""
        state = self._types.get(type_url)
        if state is None or state.interest is Interest.UNASKED or self._desired is None:
            return Sync.NOT_SENT
        if state.rejected:
            return Sync.NACKED
        current = state.up_to_date(self._desired.of(type_url)) and not state.unanswered
        return Sync.SYNCED if current else Sync.STALE

    def version(self, type_url: str) -> str:
        """The version of a type that the client should have, or "" before any is offered."""
        return self._desired.of(type_url).version if self._desired else ""

    def next_response(self) -> Response | None:
        """The next message to send, or None while there is nothing to say."""
        if self._desired is None or self._drained:
            return None
        if self._level is not None and (response := self._step(self._level, self._desired)):
            return response
        self._level = self._stride = None
        for state in self._types.values():
            desired = self._desired.of(state.type_url)
            if state.interest is Interest.UNASKED or state.up_to_date(desired):
                continue
            state.reconsider(desired)
            if response := self._update(state, desired):
                return response
        if self._may_remove():
            note_takeovers(self._types, self._desired)
            for type_url in (*REMOVAL_ORDER, *self._others()):
                state, desired = self._types[type_url], self._desired.of(type_url)
                names = removable(self._types, type_url)
                if names and (response := self._remove(state, desired, names)):
                    return response
        self._drained = True
        if greeting := self._greet(self._desired):
            return greeting
        if not self.unanswered and self._is_level(self._desired):
            self._level = self._desired
        return None

    def _greet(self, desired: Snapshot) -> Response | None:
        """A stream that ends without any response is a failure to Envoy, which stays away longer
        each time, up to 30 s: a client that has everything is answered with nothing, once."""
        state, self._greeting = self._greeting, None
        if state is None or self._nonces:
            return None
        return self._emit(state, self._version(state, desired.of(state.type_url)), ())

    def _is_level(self, desired: Snapshot) -> bool:
        levels = all(state.level(desired.of(url)) for url, state in self._types.items())
        return levels and self._routes_delivered()

    def _step(self, level: Snapshot, desired: Snapshot) -> Response | None:
        """All that the client is to be sent, if it is what all others are sent, too."""
        found = step(level, desired)
        if found is None:
            return None
        state = self._types[found.type_url]
        if not state.has_all():
            return None
        message = found.message(
            type(self), self._nonces, lambda number: self._stepping(found, number)
        )
        response = message.response
        if response.size > self._limit:
            return None
        self._use_nonce(state, message.number, response.nonce)
        state.step(found)
        self._level, self._stride = None, Stride(message, desired)
        self._drained = True
        return self._expect(state, response, found.contents)

    def _stepping(self, step: Step, number: int) -> Shared:
        url, version = step.type_url, self._version_of_all(step.type_url, step.after)
        nonce = str(number)
        frames = self._encode(url, nonce, version, step.changed, ())
        response = Response(url, nonce, version, step.changed, (), frames)
        return Shared(number, response, Ack(url, nonce), self._ack(response))

    def take_plain_ack(self, request: bytes) -> Ack | None:
        """Book a request if it takes the step and asks for nothing new. To tell that by its bytes
        costs a fraction of what it takes to read all that it might say."""
        stride = self._stride
        if stride is None:
            return None
        ack, asked = stride.message.ack, stride.message.frame.between(request)
        if asked is None or not self._asked_before(ack.type_url, asked):
            return None
        return self._stepped(ack.type_url, ack.nonce)

    def _stepped(self, type_url: str, nonce: str) -> Ack | None:
        """Book an ACK, and nothing else, if it is that of a step."""
        stride = self._stride
        if stride is None:
            return None
        ack = stride.message.ack
        if ack.nonce != nonce or ack.type_url != type_url:
            return None
        state = self._types[type_url]
        del state.unanswered[nonce]
        self.unanswered -= 1
        state.lingering.clear()
        self._level, self._stride = stride.to, None
        return ack

    def _heard(self) -> None:
        """A request came that may change anything."""
        self._drained = False
        self._level = self._stride = None

    def _others(self) -> Iterable[str]:
        return [url for url in self._types if url not in ORDER]

    def _may_remove(self) -> bool:
        return (
            not self.unanswered
            and not any(state.stuck for state in self._types.values())
            # A listener of before a reconnect may still run, for want of a route that was refused.
            and not (self._resumed and self._types[ROUTE].new)
            and self._routes_delivered()
        )

    def _routes_delivered(self) -> bool:
        """Every route and filter that the client's listeners name has been sent, if there is one.

        A listener takes over from its predecessor only with these; Envoy asks for a route after
        the listener's ACK, so an answered stream alone does not say that it has come this far.
        Who never asked for filters does without.
        """
        listeners = self._types[LISTENER]
        if self._desired is None or self.only:
            # What other streams of the same client have come to, this one cannot know.
            return True
        if listeners.interest is Interest.UNASKED:
            # Back after a reconnect: its listeners and routes may still use what is to go.
            # None desired is no reason to hurry: those it has go first.
            return not self._resumed
        if not listeners.wildcard:
            return True
        wanted = self._desired.of(LISTENER)
        routes, filters = (self._desired.of(url) for url in WARMING)
        losses = sum(self._types[url].losses for url in WARMING)
        known = self._delivered
        if known is not None and not listeners.doubts and known[3] == losses:
            same = known[0] is wanted and known[1] is routes and known[2] is filters
            if same:
                return True
        asked = {u for u in WARMING if self._types[u].interest is not Interest.UNASKED} | {ROUTE}
        delivered = all(
            name in self._types[url].sent or name not in self._desired.of(url)
            for url, name in targets(listeners, wanted)
            if url in asked
        )
        if delivered and not listeners.doubts:
            self._delivered = (wanted, routes, filters, losses)
        return delivered

    def _state(self, type_url: str) -> TypeState:
        state = self._types.get(type_url)
        if state is None:
            state = self._types[type_url] = TypeState(type_url)
        return state

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
        self.unanswered -= 1
        version, contents = found
        state.doubts.answered(nonce)
        if error is None:
            state.accept(contents)
            if state.rejected and self._desired is not None:
                state.note_doubts(self._desired.of(state.type_url))
            return Ack(state.type_url, nonce)
        error = error[:MAX_ERROR]
        nack = Nack(state.type_url, nonce, version, error)
        if state.current(contents):
            state.rejected = nack
            suspects = self._suspects(state, contents)
            current = state.current(suspects)
            alone = len(suspects) == 1 or not self._may_try_apart(state)
            state.doubts.refuse(state.type_url, current, error, alone=alone)
            if state.stuck:
                state.sent.update(dict.fromkeys(state.current(contents), UNSURE))
        return nack

    def _suspects(self, state: TypeState, contents: Mapping[str, str]) -> Mapping[str, str]:  # noqa: ARG002
        """Those parts of a refused response that may be what was wrong with it."""
        return contents

    def _may_try_apart(self, state: TypeState) -> bool:  # noqa: ARG002
        """Whether what was refused may be sent again in parts."""
        return True

    def _may_go(self, state: TypeState, entry: Encoded) -> bool:
        """A route that the client has in an earlier version waits until its clusters are taken."""
        if state.type_url != ROUTE or entry.name in state.due:
            return True
        untried = self._types[CLUSTER].new
        if not untried or not state.has_earlier(entry.name):
            return True
        return not any(t.type_url == CLUSTER and t.name in untried for t in entry.refers)

    def _ready(self, state: TypeState, entries: Iterable[Encoded]) -> list[Encoded]:
        """Those that may be sent; the others are held."""
        ready = []
        state.held.clear()
        for entry in entries:
            if self._may_go(state, entry):
                ready.append(entry)
            else:
                state.hold(entry.name)
        return ready

    def _fit(
        self, state: TypeState, entries: Iterable[Encoded], absent: Iterable[str] = ()
    ) -> tuple[list[Encoded], list[str]]:
        """As much as one message may hold; the rest waits for the next one."""
        room = self._limit - HEAD_BYTES
        some: list[Encoded] = []
        told: list[str] = []
        waiting = set()
        for entry in entries:
            room -= len(self._frame(entry))
            if room >= 0 or not some:
                some.append(entry)
            else:
                waiting.add(entry.name)
        for name in absent:
            room -= len(name.encode()) + _NAME
            if room >= 0 or not (some or told):
                told.append(name)
            else:
                waiting.add(name)
        for name in waiting - state.due:
            state.hold(name)
        state.due &= waiting
        return some, told

    def _try_apart(self, state: TypeState, desired: ResourceSet) -> Response | None:
        """A part of what was refused, on its own."""
        part = state.doubts.next_part()
        if not part:
            return None
        entries = [desired[name] for name, version in part.items() if version]
        if state.type_url == CLUSTER:
            self._send_endpoints_of(entries)
        gone = [name for name, version in part.items() if not version]
        response = self._emit(state, self._version(state, desired), entries, gone)
        state.doubts.on_trial(part, response.nonce)
        return response

    def _emit(
        self,
        state: TypeState,
        version: str,
        resources: Iterable[Encoded],
        removed: Iterable[str] = (),
        suffix: str = "",
    ) -> Response:
        """A message; `suffix` is for the client to say with the version when it comes back."""
        nonce = self._next_nonce(state)
        chosen, gone = tuple(resources), tuple(removed)
        frames = self._encode(state.type_url, nonce, version + suffix, chosen, gone)
        response = Response(state.type_url, nonce, version, chosen, gone, frames)
        return self._expect(state, response, response.versions())

    def _next_nonce(self, state: TypeState) -> str:
        """For the message that is about to be sent."""
        number = self._nonces + 1
        self._use_nonce(state, number, str(number))
        return state.last_nonce

    def _use_nonce(self, state: TypeState, number: int, nonce: str) -> None:
        self._nonces, state.last_nonce, state.owed = number, nonce, False

    def _expect(
        self, state: TypeState, response: Response, contents: Mapping[str, str]
    ) -> Response:
        """Remember what the client is to answer."""
        state.unanswered[response.nonce] = (response.version, contents)
        self.unanswered += 1
        return response

    def _send_endpoints_of(self, clusters: Iterable[Encoded]) -> None:
        """A cluster that is new or changed stays warming until its endpoints come (again).

        Envoy asks for those of a new cluster only, and a route may follow right behind. After a
        reconnect it may ask for them later and say that it has them: they are due all the same.
        """
        if self._desired is not None and not self.only:
            served = self._desired.of(ENDPOINT)
            state = self._types[ENDPOINT]
            targets = (target for cluster in clusters for target in cluster.refers)
            state.due.update(
                t.name
                for t in targets
                if t.type_url == ENDPOINT
                and t.name in served
                and not state.doubts.holds(t.name, served[t.name].version)
            )

    @abstractmethod
    def _update(self, state: TypeState, desired: ResourceSet) -> Response | None:
        """What is new, changed or asked for of one type."""

    @abstractmethod
    def _remove(
        self, state: TypeState, desired: ResourceSet, names: Iterable[str]
    ) -> Response | None:
        """Takes away these stale resources of one type; None where there is no way to say so."""

    def _version(self, state: TypeState, desired: ResourceSet) -> str:
        """What a response says to be."""
        return self._version_of_all(state.type_url, desired)

    def _version_of_all(self, type_url: str, desired: ResourceSet) -> str:  # noqa: ARG002
        """What it says to a client that has all of the type."""
        return desired.version

    @abstractmethod
    def parse(self, request: bytes) -> Any:
        """A request as a message. DecodeError."""

    @staticmethod
    @abstractmethod
    def _ack(response: Response) -> Frame:
        """How the request looks that takes a response."""

    @abstractmethod
    def _asked_before(self, type_url: str, asked: bytes) -> bool:
        """Whether the rest of a request asks for nothing new."""

    @staticmethod
    @abstractmethod
    def _frame(entry: Encoded) -> bytes:
        """A resource as it stands in a message."""

    @abstractmethod
    def _encode(
        self,
        type_url: str,
        nonce: str,
        version: str,
        resources: tuple[Encoded, ...],
        removed: tuple[str, ...],
    ) -> tuple[bytes, ...]:
        """The message as bytes, in pieces."""
