"""The state-of-the-world ADS variant, as gRPC's own client speaks it.

Source: "The xDS transport protocol" in Envoy's API documentation.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse

from xds_server.claims import Refused, parse, suffix
from xds_server.exchange import Ack, Nack, Response
from xds_server.quarantine import Quarantined, named
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE
from xds_server.snapshot import (
    EMPTY,
    Encoded,
    ResourceSet,
    Snapshot,
    set_version,
    version_of_marks,
)
from xds_server.step import Frame
from xds_server.stream import MAX_RESPONSE_BYTES, WHOLE_TYPES, WILDCARD, Stream
from xds_server.typestate import Interest, TypeState

#: What complete responses of a type name; a client lets go of what nothing names any more.
_NAMED_BY = {CLUSTER: (ENDPOINT,), LISTENER: (ROUTE, FILTER)}


class SotwStream(Stream):
    """A client whose every request lists all names it wants.

    Responses for listeners and clusters are complete: what is missing is deleted. Other types
    are sent resource by resource, and there is no way to say that one does not exist.

    A response's version tells all that the client has once it took the response, so that a client
    that comes back with it, for the same names, need not be sent them again, whatever server it
    comes to. For that, who drops a name is answered, with nothing but the version of what is left.
    """

    #: The client may have dropped a name, taken it up again while it was away, and still say the
    #: version that it had before: what it names is sent to it again.
    forgetful = False

    def __init__(self, limit: int = MAX_RESPONSE_BYTES, only: str = "") -> None:
        super().__init__(limit, only)
        #: type -> version that the client says it still has from an earlier stream.
        self._claimed: dict[str, str] = {}
        #: The names that came with that and are due for no other reason, of types sent one by one.
        self._returned: dict[str, set[str]] = {}
        #: Types of which the client came with a state that is not known here.
        self._unknown: set[str] = set()
        #: Complete responses without an answer, by nonce, and what the client took, by type. What
        #: is to go, and what stands in for a version that was refused, stays in responses.
        self._offered: dict[str, Mapping[str, Encoded]] = {}
        self._taken: dict[str, Mapping[str, Encoded]] = {url: {} for url in WHOLE_TYPES}
        #: By type, names sent that the client may have let go of since, with what named them: no
        #: version counts them before they are sent again.
        self._loose: dict[str, set[str]] = {
            url: set() for urls in _NAMED_BY.values() for url in urls
        }
        #: By type, what the list of names looked like that made `names` what they are.
        self._listed: dict[str, int] = {}

    def parse(self, request: bytes) -> Any:
        return DiscoveryRequest.FromString(request)

    def receive(self, request: DiscoveryRequest) -> Ack | Nack | None:
        """Take in a request; returns the answer that it carries, if any.

        A request that does not carry the last nonce of its type was overtaken by that response:
        its names do not count, since the client will answer the response with all of them. Before
        there is a response nothing overtakes, whatever nonce a client brings from another stream.
        """
        state = self._state(request.type_url)
        error = request.error_detail.message if request.HasField("error_detail") else None
        if state.last_nonce and request.response_nonce != state.last_nonce:
            self._heard()
            return self._book(state, request.response_nonce, error)
        repeated = self.repeats(request)
        names: Set[str] = state.names if repeated else set(request.resource_names)
        if (
            self._stride is not None
            and error is None
            and (repeated or names == state.names)
            and (ack := self._stepped(request.type_url, request.response_nonce))
        ):
            return ack
        self._heard()
        if state.interest is Interest.UNASKED and request.version_info:
            claimed, refused = parse(state.type_url, request.version_info)
            self._claimed[state.type_url] = claimed
            if state.type_url not in WHOLE_TYPES:
                self._returned[state.type_url] = set(names) - state.due
            self._recall(state, refused)
        self._ask(state, names_something=bool(names), owed=True)
        if state.interest is Interest.NAMED and not repeated:
            self._replace(state, names)
            self._listed.pop(state.type_url, None)
            if WILDCARD not in names:
                self._listed[state.type_url] = _list_of(request)
        return self._book(state, request.response_nonce, error)

    def repeats(self, request: DiscoveryRequest) -> bool:
        """Whether a request lists what the one before listed for its type, in the same order. Each
        ACK does, and to look at a thousand names costs more than all else there is to it."""
        listed = self._listed.get(request.type_url)
        return listed is not None and listed == _list_of(request)

    def _recall(self, state: TypeState, refused: Iterable[Refused]) -> None:
        """Know what the client refused on an earlier stream."""
        untried = {}
        for each in refused:
            found = each.what
            state.rejected = Nack(found.type_url, "", found.version, found.error)
            state.sent[found.name] = found.version
            if each.has is None:
                state.new.add(found.name)
            else:
                taken = self._taken[found.type_url]
                self._taken[found.type_url] = {**taken, found.name: each.has}
            if each.alone:
                state.doubts.quarantined[found.name] = found
            else:
                untried[found.name] = found.version
        if state.rejected is not None and untried:
            state.doubts.refuse(state.type_url, untried, state.rejected.error, alone=False)

    def _refused(self, state: TypeState, desired: ResourceSet) -> Iterator[Refused]:
        """What complete responses hold in another version than the one desired, or not at all."""
        taken, doubts = self._taken[state.type_url], state.doubts
        for found in doubts.standing(desired.version_of):
            yield Refused(found, alone=True, has=taken.get(found.name))
        error = state.rejected.error if state.rejected else ""
        for name, version in doubts.untried().items():
            what = Quarantined(state.type_url, name, version, error)
            yield Refused(what, alone=False, has=taken.get(name))

    def _book(self, state: TypeState, nonce: str, error: str | None) -> Ack | Nack | None:
        offered = self._offered.pop(nonce, None)
        before = dict(state.doubts.quarantined)
        answer = self._answer(state, nonce, error)
        if offered is not None and isinstance(answer, Ack):
            self._taken[state.type_url] = offered
            self._unknown.discard(state.type_url)
        elif (
            state.doubts.quarantined != before
            and not state.doubts.open
            and self._may_try_apart(state)
        ):
            # What it has once more, for the version that it is to come back with.
            state.owed = state.type_url in WHOLE_TYPES
        return answer

    def _may_try_apart(self, state: TypeState) -> bool:
        """To leave something out of a complete response deletes it: not before it is known what the
        client has."""
        return state.type_url not in self._unknown

    def _suspects(self, state: TypeState, contents: Mapping[str, str]) -> Mapping[str, str]:
        """In a complete response, only what the client has not taken before.

        As long as it is not known what the client has, only what its words name.
        """
        if state.type_url not in WHOLE_TYPES:
            return contents
        if not self._may_try_apart(state):
            names = named(state.rejected.error, contents) if state.rejected else ()
            return {name: contents[name] for name in names}
        taken = self._taken[state.type_url]
        return {n: v for n, v in contents.items() if n not in taken or taken[n].version != v}

    def _replace(self, state: TypeState, names: Set[str]) -> None:
        """Bring the subscription to exactly these names."""
        whole = state.type_url in WHOLE_TYPES
        plain = names - {WILDCARD}
        added, dropped = plain - state.names, state.names - plain
        state.names = plain
        state.due |= added
        state.owed |= whole and bool(added)
        state.owed |= not whole and any(map(state.sent.get, dropped))
        if WILDCARD in names and not state.wildcard:
            state.start_wildcard(owed=whole)
        elif WILDCARD not in names and state.wildcard:
            state.end_wildcard()
        if not state.wildcard:
            for name in dropped:
                state.forget(name)
            self._loose.get(state.type_url, set()).difference_update(dropped)
            # Taken up again, it is asked for anew, whatever the client came with.
            self._returned.get(state.type_url, set()).difference_update(dropped)

    def _update(self, state: TypeState, desired: ResourceSet) -> Response | None:
        if state.type_url in WHOLE_TYPES:
            return self._update_whole(state, desired)
        self._resume(state, desired)
        names = state.candidates(desired)
        there = sorted(n for n in names if n in desired)
        fresh = [entry for entry in map(desired.__getitem__, there) if state.outdated(entry)]
        fresh = self._ready(state, fresh)
        for name in names - desired.keys():
            if state.sent.get(name) and name not in state.stale:
                state.linger(name)
                state.stale.add(name)
        # What is not to go after all was left out of the version that the client was told.
        state.owed |= not state.stale.isdisjoint(desired.keys())
        state.stale -= desired.keys()
        fresh, _ = self._fit(state, fresh)
        state.book(fresh)
        self._loose.get(state.type_url, set()).difference_update(entry.name for entry in fresh)
        state.reflect(desired)
        if not (fresh or state.owed):
            return self._try_apart(state, desired)
        return self._emit(state, self._version(state, desired), fresh)

    def _resume(self, state: TypeState, desired: ResourceSet) -> None:
        """Take note of what the client has from an earlier stream.

        What is due with its cluster stays so: the client's cluster warms.
        """
        claimed = self._claimed.pop(state.type_url, None)
        returned = self._returned.pop(state.type_url, set())
        if claimed is None or self.forgetful or state.wildcard:
            return
        wanted = [desired[name] for name in state.names if name in desired]
        if claimed == version_of_marks(self._marks(state, wanted)):
            state.sent.update((entry.name, entry.version) for entry in wanted)
            state.due -= returned
            self._greeting = state
        else:
            # If only to be told what it has: a name that it dropped is not had any more.
            state.owed = True

    def _version(self, state: TypeState, desired: ResourceSet) -> str:
        """Of all that the client has once it took what it was sent."""
        clusters, loose = self._types[CLUSTER], self._loose.get(state.type_url, ())
        reached = state.type_url != ENDPOINT or self.only or clusters.up_to_date(self._clusters())
        if (
            reached
            and state.names == desired.names
            and not (state.held or state.due or state.rejected or loose)
        ):
            return self._version_of_all(state.type_url, desired)
        sent = (desired[name] for name in state.sent if name in desired and name not in loose)
        holds = state.doubts.holds
        had = [e for e in sent if not state.outdated(e) and not holds(e.name, e.version)]
        # Nobody is to take the endpoints of before a cluster's change for those that come after it.
        return version_of_marks(self._marks(state, had) + (not reached))

    def _version_of_all(self, type_url: str, desired: ResourceSet) -> str:
        return version_of_marks(desired.mark + sum(self._users(type_url).values()))

    def _marks(self, state: TypeState, entries: Iterable[Encoded]) -> int:
        users = self._users(state.type_url)
        return sum(entry.mark + users.get(entry.name, 0) for entry in entries)

    def _users(self, type_url: str) -> Mapping[str, int]:
        """What versions of endpoints have of their clusters: these wait for them at each change,
        so that a client which was not sent them since has not what it needs."""
        return self._clusters().marks_of(ENDPOINT) if type_url == ENDPOINT else {}

    def _clusters(self) -> ResourceSet:
        return self._desired.of(CLUSTER) if self._desired is not None else EMPTY

    def _update_whole(self, state: TypeState, desired: ResourceSet) -> Response | None:
        if state.doubts.trying:
            # The answer decides which versions a complete response may hold.
            return None
        if told := self._tell_before_naming_again(desired, _NAMED_BY[state.type_url]):
            return told
        taken = self._taken[state.type_url]
        chosen = [entry for name, entry in desired.items() if state.wants(name)]
        claimed = self._claimed.pop(state.type_url, None)
        resumed = (
            claimed is not None
            and not (self.forgetful and not state.wildcard)
            and claimed == set_version(self._entries(state, desired))
        )
        if claimed is not None and not resumed:
            self._unknown.add(state.type_url)
        fresh = [entry for entry in chosen if state.outdated(entry)]
        gone = {n for n, version in state.sent.items() if version and n not in desired}
        # Only what the client took can be in use; what it refused must not be offered again.
        kept = gone & taken.keys() if state.type_url == CLUSTER else set()
        news = bool(fresh or state.owed or gone - kept) and not resumed
        for name in kept - state.stale:
            state.linger(name)
        state.stale = kept
        state.book(chosen)
        state.reflect(desired)
        state.due.clear()
        state.owed = False
        state.book_absent(gone - kept)
        if resumed:
            entries = self._entries(state, desired)
            self._taken[state.type_url] = {**taken, **_by_name(entries, desired)}
            state.new.difference_update(self._taken[state.type_url])
        if not news:
            return self._try_apart(state, desired)
        if state.type_url == CLUSTER:
            # Also what goes back to the version taken, past one that is on its way.
            self._send_endpoints_of(fresh)
        return self._emit_whole(state, desired)

    def _try_apart(self, state: TypeState, desired: ResourceSet) -> Response | None:
        if state.type_url not in WHOLE_TYPES:
            return super()._try_apart(state, desired)
        part = state.doubts.next_part()
        if not part:
            return None
        response = self._emit_whole(state, desired, part)
        state.doubts.on_trial(part, response.nonce)
        return response

    def _remove(
        self, state: TypeState, desired: ResourceSet, names: Iterable[str]
    ) -> Response | None:
        state.book_absent(names)
        if state.type_url not in WHOLE_TYPES:
            # The client has it until it asks no more; nothing that counts uses it.
            return None
        return self._emit_whole(state, desired)

    def _entries(
        self, state: TypeState, desired: ResourceSet, part: Iterable[str] = ()
    ) -> list[Encoded]:
        """All that the client asked for, but what it refused only in the version that it took.

        `part` is what is tried again.
        """
        taken = self._taken[state.type_url]
        entries = []
        for name, entry in desired.items():
            if not state.wants(name):
                continue
            if name not in part and state.doubts.holds(name, entry.version):
                if name in taken:
                    entries.append(taken[name])
                elif not self._may_try_apart(state):
                    # It may have an earlier version, and takes the others (Envoy, gRPC).
                    entries.append(entry)
            else:
                entries.append(entry)
        return entries + [taken[name] for name in sorted(state.stale)]

    def _emit_whole(
        self, state: TypeState, desired: ResourceSet, part: Iterable[str] = ()
    ) -> Response:
        taken, entries = self._taken[state.type_url], self._entries(state, desired, part)
        if state.type_url == CLUSTER:
            self._send_endpoints_of(
                entry
                for entry in entries
                if entry.name not in taken or taken[entry.name].version != entry.version
            )
        known = suffix(self._refused(state, desired)) if self._may_try_apart(state) else ""
        response = self._emit(state, set_version(entries), entries, suffix=known)
        self._offered[response.nonce] = _by_name(entries, desired)
        self._loosen(state.type_url, entries, desired)
        return response

    def _loosen(self, type_url: str, entries: Iterable[Encoded], desired: ResourceSet) -> None:
        """The client lets go of what these do not name, and is not heard of it yet."""
        if self.only or self.forgetful:
            return
        others = [entry for entry in entries if desired.get(entry.name) is not entry]
        targets = {target for entry in others for target in entry.refers}
        for url in _NAMED_BY[type_url]:
            state = self._types[url]
            had = state.base.names if state.base is not None and state.has_all() else {*state.sent}
            used = {target.name for target in targets if target.type_url == url}
            self._loose[url] |= (had & state.names) - desired.names_of(url) - used

    def _tell_before_naming_again(
        self, desired: ResourceSet, urls: Iterable[str]
    ) -> Response | None:
        """A client that lets go of a name and is made to name it again before that is heard would
        come back as if it had had it all the time: between both it is told a version without it."""
        for url in urls:
            state, loose = self._types[url], self._loose[url]
            again = loose & desired.names_of(url) & state.names
            if again and self._desired is not None:
                loose -= again
                state.due |= again
                return self._emit(state, self._version(state, self._desired.of(url)), ())
        return None

    def _is_level(self, desired: Snapshot) -> bool:
        # What is gone altogether is in no version.
        counted = (names & desired.of(url).names for url, names in self._loose.items() if names)
        return not any(counted) and super()._is_level(desired)

    @staticmethod
    def _ack(response: Response) -> Frame:
        head = DiscoveryRequest(version_info=response.version).SerializeToString()
        return Frame(head, DiscoveryRequest(response_nonce=response.nonce).SerializeToString())

    def _asked_before(self, type_url: str, asked: bytes) -> bool:
        return self._listed.get(type_url) == hash(asked)

    @staticmethod
    def _frame(entry: Encoded) -> bytes:
        return entry.sotw_frame

    def _encode(
        self,
        type_url: str,
        nonce: str,
        version: str,
        resources: tuple[Encoded, ...],
        removed: tuple[str, ...],  # noqa: ARG002 - this variant deletes by leaving out
    ) -> tuple[bytes, ...]:
        head: bytes = DiscoveryResponse(
            type_url=type_url, nonce=nonce, version_info=version
        ).SerializeToString()
        return (head, *map(self._frame, resources))


def _by_name(entries: Sequence[Encoded], desired: ResourceSet) -> Mapping[str, Encoded]:
    """The desired set itself, which all clients share, where it is these."""
    if len(entries) == len(desired) and all(desired.get(e.name) is e for e in entries):
        return desired
    return {entry.name: entry for entry in entries}


def _list_of(request: DiscoveryRequest) -> int:
    """Stands for what a request says beside the version and nonce that it answers."""
    version, nonce = request.version_info, request.response_nonce
    request.ClearField("version_info")
    request.ClearField("response_nonce")
    found = hash(request.SerializeToString())
    request.version_info, request.response_nonce = version, nonce
    return found
