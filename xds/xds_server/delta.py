"""The incremental ADS variant. Source: "Incremental xDS" in Envoy's API documentation."""

from collections.abc import Iterable
from typing import Any

from envoy.service.discovery.v3.discovery_pb2 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
)

from xds_server.exchange import Ack, Nack, Response
from xds_server.references import CLUSTER, ENDPOINT, LISTENER
from xds_server.snapshot import Encoded, ResourceSet
from xds_server.step import Frame
from xds_server.stream import HEAD_BYTES, WILDCARD, Stream
from xds_server.typestate import Interest, TypeState


class DeltaStream(Stream):
    """A client that subscribes and unsubscribes by name and is sent single resources."""

    def parse(self, request: bytes) -> Any:
        return DeltaDiscoveryRequest.FromString(request)

    def receive(self, request: DeltaDiscoveryRequest) -> Ack | Nack | None:
        """Take in a request; returns the answer that it carries, if any.

        Subscriptions count whatever the nonce; a nonce that is not ours answers nothing.
        """
        subscribe, unsubscribe = (
            request.resource_names_subscribe,
            request.resource_names_unsubscribe,
        )
        known, failed = request.initial_resource_versions, request.HasField("error_detail")
        if (
            self._stride is not None
            and not (subscribe or unsubscribe or known or failed)
            and (ack := self._stepped(request.type_url, request.response_nonce))
        ):
            return ack
        self._heard()
        state = self._state(request.type_url)
        for name in unsubscribe:
            self._unsubscribe(state, name)
        known = dict(known)
        was_wildcard = state.wildcard and state.interest is Interest.NAMED
        self._ask(state, names_something=bool(subscribe or unsubscribe), owed=not known)
        asked = set(subscribe)
        if WILDCARD in asked:
            asked.remove(WILDCARD)
            if was_wildcard:
                state.due.update(state.sent)
            elif not state.wildcard:
                state.start_wildcard(owed=not known)
        if asked:
            state.own_names().update(asked)
            # A name that comes with its version is not asked for again: the client has it.
            state.due |= asked - known.keys()
        if known:
            self._resumed = True
            state.sent.update((n, v) for n, v in known.items() if state.wants(n))
            state.base = None
            self._greeting = state
        error = request.error_detail.message if failed else None
        return self._answer(state, request.response_nonce, error)

    def _unsubscribe(self, state: TypeState, name: str) -> None:
        if name == WILDCARD:
            state.end_wildcard()
        elif name in state.names:
            state.own_names().discard(name)
            if state.wildcard:
                # The client cannot know whether "*" still covers the name: it must be told.
                state.due.add(name)
            else:
                state.forget(name)

    def _begin(self, state: TypeState, desired: ResourceSet) -> Response | None:
        """All at once, as far as it takes no look at each: for clients that come with nothing."""
        others = self._types[ENDPOINT]
        if not state.lacks_all(desired) or len(desired.delta_frames) > self._limit - HEAD_BYTES:
            return None
        if state.type_url == CLUSTER and others.doubts:
            return None
        if state.type_url == CLUSTER and self._desired is not None and not self.only:
            others.due |= desired.names_of(ENDPOINT) & self._desired.of(ENDPOINT).names
        state.begin(desired)
        nonce = self._next_nonce(state)
        head = self._encode(state.type_url, nonce, desired.version, (), ())
        frames = (*head, desired.delta_frames)
        version, contents = desired.version, desired.versions
        response = Response(state.type_url, nonce, version, desired.in_order, (), frames)
        return self._expect(state, response, contents)

    def _update(self, state: TypeState, desired: ResourceSet) -> Response | None:
        if response := self._begin(state, desired):
            return response
        names = state.candidates(desired)
        there = sorted(n for n in names if n in desired)
        fresh = [entry for entry in map(desired.__getitem__, there) if state.outdated(entry)]
        fresh = self._ready(state, fresh)
        lost = {n for n in names if n not in desired and state.wants(n)}
        absent = {n for n in lost if n in state.due or (n in state.names and n not in state.sent)}
        gone = {n for n in lost - absent if state.sent.get(n)}
        if state.type_url == LISTENER:
            absent |= gone
        else:
            for name in lost - state.stale:
                state.linger(name)
            state.stale |= gone
        if state.stale:
            state.stale -= desired.keys()
        fresh, told = self._fit(state, fresh, sorted(absent))
        state.book(fresh)
        state.reflect(desired)
        if not (fresh or told or state.owed):
            return self._try_apart(state, desired)
        if state.type_url == CLUSTER:
            self._send_endpoints_of(fresh)
        state.book_absent(told, in_use=True)
        return self._emit(state, desired.version, fresh, told)

    def _remove(self, state: TypeState, desired: ResourceSet, names: Iterable[str]) -> Response:
        _, names = self._fit(state, (), names)
        state.book_absent(names)
        return self._emit(state, desired.version, (), names)

    @staticmethod
    def _ack(response: Response) -> Frame:
        request = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        return Frame(b"", request.SerializeToString())

    def _asked_before(self, type_url: str, asked: bytes) -> bool:  # noqa: ARG002
        return not asked

    @staticmethod
    def _frame(entry: Encoded) -> bytes:
        return entry.delta_frame

    def _encode(
        self,
        type_url: str,
        nonce: str,
        version: str,
        resources: tuple[Encoded, ...],
        removed: tuple[str, ...],
    ) -> tuple[bytes, ...]:
        head: bytes = DeltaDiscoveryResponse(
            type_url=type_url, nonce=nonce, system_version_info=version, removed_resources=removed
        ).SerializeToString()
        return (head, *map(self._frame, resources))
