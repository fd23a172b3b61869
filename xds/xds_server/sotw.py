"""The state-of-the-world ADS variant, as gRPC's own client speaks it.

Source: "The xDS transport protocol" in Envoy's API documentation.
"""

from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse

from xds_server.references import CLUSTER
from xds_server.snapshot import Encoded, ResourceSet, set_version
from xds_server.stream import (
    WHOLE_TYPES,
    WILDCARD,
    Ack,
    Interest,
    Nack,
    Response,
    Stream,
    TypeState,
)


class SotwStream(Stream):
    """A client whose every request lists all names it wants.

    Responses for listeners and clusters are complete: what is missing is deleted. Other types
    are sent resource by resource, and there is no way to say that one does not exist.
    """

    def __init__(self) -> None:
        super().__init__()
        #: type -> version that the client says it still has from an earlier stream.
        self._claimed: dict[str, str] = {}
        #: The clusters as sent, and those of them that the client took: when they are to go, they
        #: stay in responses until nothing uses them.
        self._offered: dict[str, Encoded] = {}
        self._clusters: dict[str, Encoded] = {}

    def receive(self, request: DiscoveryRequest) -> Ack | Nack | None:
        """Take in a request; returns the answer that it carries, if any.

        A request that does not carry the last nonce of its type was overtaken by that response:
        its names do not count, since the client will answer the response with all of them.
        """
        state = self._state(request.type_url)
        self._drained = False
        error = request.error_detail.message if request.HasField("error_detail") else None
        if request.response_nonce != state.last_nonce:
            return self._book(state, request.response_nonce, error)
        names = set(request.resource_names)
        if state.interest is Interest.UNASKED and request.version_info:
            self._claimed[state.type_url] = request.version_info
        self._ask(state, names_something=bool(names), owed=True)
        if state.interest is Interest.NAMED:
            self._replace(state, names)
        return self._book(state, request.response_nonce, error)

    def _book(self, state: TypeState, nonce: str, error: str | None) -> Ack | Nack | None:
        _, contents = state.unanswered.get(nonce, ("", {}))
        answer = self._answer(state, nonce, error)
        if isinstance(answer, Ack) and state.type_url == CLUSTER:
            for name, version in contents.items():
                offered = self._offered.get(name)
                if offered is not None and offered.version == version:
                    self._clusters[name] = offered
        return answer

    def _replace(self, state: TypeState, names: set[str]) -> None:
        """Bring the subscription to exactly these names."""
        whole = state.type_url in WHOLE_TYPES
        plain = names - {WILDCARD}
        added, dropped = plain - state.names, state.names - plain
        state.names = plain
        state.due |= added
        state.owed |= whole and bool(added)
        if WILDCARD in names and not state.wildcard:
            state.start_wildcard(owed=whole)
        elif WILDCARD not in names and state.wildcard:
            state.end_wildcard()
        if not state.wildcard:
            for name in dropped:
                state.forget(name)

    def _update(self, state: TypeState, desired: ResourceSet) -> Response | None:
        if state.type_url in WHOLE_TYPES:
            return self._update_whole(state, desired)
        names = state.candidates(desired)
        fresh = [desired[n] for n in sorted(names) if n in desired and state.outdated(desired[n])]
        for name in names - desired.keys():
            state.forget(name)
        state.base = desired
        state.due.clear()
        if not fresh:
            return None
        state.book(fresh)
        return self._emit(state, _version(state, desired), fresh)

    def _update_whole(self, state: TypeState, desired: ResourceSet) -> Response | None:
        chosen = [entry for name, entry in desired.items() if state.wants(name)]
        resumed = self._claimed.pop(state.type_url, None) == _version(state, desired)
        fresh = [entry for entry in chosen if state.outdated(entry)]
        gone = {n for n, version in state.sent.items() if version and n not in desired}
        is_cluster = state.type_url == CLUSTER
        # Only what the client took can be in use; what it refused must not be offered again.
        kept = gone & self._clusters.keys() if is_cluster else set()
        news = bool(fresh or state.owed or gone - kept) and not resumed
        state.stale = kept
        state.base = desired
        state.due.clear()
        state.owed = False
        state.book(chosen)
        state.book_absent(gone - kept)
        if is_cluster:
            self._offered.update((entry.name, entry) for entry in chosen)
            if resumed:
                self._clusters.update((entry.name, entry) for entry in chosen)
        if not news:
            return None
        if is_cluster:
            self._send_endpoints_of(fresh)
        entries = (*chosen, *(self._clusters[name] for name in sorted(kept)))
        response = self._emit(state, set_version(entries), entries)
        for name in kept:
            # Whether the client likes what is about to go does not matter.
            state.unanswered[response.nonce][1].pop(name)
        return response

    def _remove(self, state: TypeState, desired: ResourceSet) -> Response:
        for name in state.stale:
            self._clusters.pop(name, None)
            self._offered.pop(name, None)
        state.book_absent(set(state.stale))
        chosen = [entry for name, entry in desired.items() if state.wants(name)]
        return self._emit(state, _version(state, desired), chosen)

    def _encode(
        self,
        type_url: str,
        nonce: str,
        version: str,
        resources: tuple[Encoded, ...],
        removed: tuple[str, ...],  # noqa: ARG002 - this variant deletes by leaving out
    ) -> bytes:
        head: bytes = DiscoveryResponse(
            type_url=type_url, nonce=nonce, version_info=version
        ).SerializeToString()
        return b"".join((head, *(entry.sotw_frame for entry in resources)))


def _version(state: TypeState, desired: ResourceSet) -> str:
    if state.wildcard:
        return desired.version
    return set_version(entry for name, entry in desired.items() if name in state.names)
