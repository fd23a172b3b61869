"""One client's stream and where it stands: requests in, what it lacks out, answers booked."""

import asyncio
import logging
from collections.abc import Awaitable, Collection, Sequence
from itertools import chain
from typing import Any, NamedTuple

import grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DiscoveryRequest

from xds_server.admission import Limits, Reason, Refused, TokenBucket
from xds_server.delta import DeltaStream
from xds_server.exchange import Ack, Nack, Response
from xds_server.generation import Generation
from xds_server.hub import Hub
from xds_server.identity import Peer
from xds_server.ir import NodeId
from xds_server.push import listed
from xds_server.references import kind
from xds_server.snapshot import Snapshot
from xds_server.sotw import SotwStream
from xds_server.standing import Standing, Sync, TypeStanding
from xds_server.stream import MAX_RESPONSE_BYTES, ORDER
from xds_server.tally import label

log = logging.getLogger(__name__)

#: What is read when the client has ended its side.
END = grpc.aio.EOF  # type: ignore[attr-defined]
#: What a request costs its sender more than others, by the names in it.
_NAMES_A_REQUEST = 100


class _Sent(NamedTuple):
    """A version of a type, and when that was; seconds since the epoch."""

    version: str
    at: float


class Connection:
    """The pumps between a gRPC stream and its state machine."""

    def __init__(
        self,
        hub: Hub,
        node: NodeId,
        stream: DeltaStream | SotwStream,
        peer: Peer | None,
        limits: Limits,
        address: str,
    ) -> None:
        """`address` is where the client comes from, as gRPC tells it."""
        self.node = node
        self.stream = stream
        self.peer = peer
        self.address = address
        #: The client ended its side.
        self.closed = False
        self._leaving = False
        #: While the writer has nothing to do; what it is to send next, if that is known already.
        self._idle: asyncio.Future[None] | None = None
        self._planned: Response | None = None
        self._hub = hub
        self._limits = limits
        self._pace = TokenBucket(limits.requests, 10 * limits.requests)
        self._generation: Generation | None = None
        self._connected_at = hub.clock()
        self._sent: dict[str, _Sent] = {}
        self._accepted: dict[str, _Sent] = {}
        self._refused: dict[str, tuple[float, Nack]] = {}

    def __str__(self) -> str:
        return f"{self.node.pod}.{self.node.namespace}"

    def standing(self) -> Standing:
        """Where the client stands now."""
        types = tuple(self._type_standing(url) for url in ORDER)
        variant = "delta" if isinstance(self.stream, DeltaStream) else "sotw"
        return Standing(self.node, variant, self._connected_at, types)

    def _type_standing(self, type_url: str) -> TypeStanding:
        accepted = self._accepted.get(type_url)
        version, at = (accepted.version, accepted.at) if accepted else ("", None)
        sync = self.stream.sync(type_url)
        if sync is Sync.SYNCED:
            # What came from an earlier stream, or did not concern this client, needs no answer.
            version = self.stream.version(type_url)
        refused_at, nack = self._refused.get(type_url, (None, None))
        error, refused_version = (nack.error, nack.version) if nack else ("", "")
        held = sorted(each.name for each in self.stream.quarantined if each.type_url == type_url)
        if held:
            error = f"{listed(held)} kept back: {error}"
        elif self.stream.stuck(type_url):
            error = f"all of it refused, to be sent again with the next change: {error}"
        return TypeStanding(type_url, sync, version, at, error, refused_version, refused_at)

    def leave(self) -> None:
        """End the stream in good order, after the message that is on its way.

        A write that the client does not take is left to the connection's own end: gRPC has no
        way to take it back.
        """
        self._leaving = True
        self._wake()

    async def read(self, context: Any) -> None:
        """Take in requests until the client ends its side."""
        try:
            while (request := await context.read()) is not END:
                names = self._take(request)
                # Until the next one comes it would be kept, which gRPC's own iterator does.
                del request
                if wait := self._pace.owe(1 + names / _NAMES_A_REQUEST):
                    # Not read means held back by HTTP/2's window: a flood costs its sender.
                    await asyncio.sleep(wait)
        finally:
            self.closed = True
            self._wake()

    def _take(self, request: bytes) -> int:
        """Take in one request; how many names it holds."""
        answer = self.stream.take_plain_ack(request)
        if answer is None:
            return self.receive(self.stream.parse(request))
        self._book(answer, self._hub.clock())
        self._go_on()
        return 0

    def receive(self, request: Any) -> int:
        """Take in one request and book the answer that it carries, if any; how many names it holds.

        Refused when the client asks for more than one may, or for what the stream does not serve.
        """
        if only := self.stream.only:
            request.type_url = request.type_url or only
            if request.type_url != only:
                raise Refused(
                    Reason.MALFORMED,
                    f"asks for {request.type_url[:200]!r}; this method serves {only} only",
                )
        elif not request.type_url:
            raise Refused(Reason.MALFORMED, "asks for no type; set type_url")
        names = _bound(request, self.stream, self._limits)
        now = self._hub.clock()
        answer = self.stream.receive(request)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s asks %s", self, _question(request))
        if answer is not None:
            self._book(answer, now)
        self._go_on()
        return names

    def _book(self, answer: Ack | Nack, now: float) -> None:
        # Nonces can be guessed: one that is about to be sent may be answered already.
        sent = self._sent.pop(answer.nonce, _Sent("", now))
        name, tally = label(answer.type_url), self._hub.tally
        tally.ack_seconds[name].add(now - sent.at)
        nack = None
        if isinstance(answer, Nack):
            tally.nacks[name] += 1
            self._refused[answer.type_url] = (now, answer)
            nack = f"{self}: {kind(answer.type_url)} {answer.version}: {answer.error}"
            log.warning("%s NACK %s: %s", self, _answered(answer, now - sent.at), answer.error)
        else:
            self._accepted[answer.type_url] = _Sent(sent.version, now)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s ACK %s", self, _answered(answer, now - sent.at))
        self._hub.answered(self, answer.nonce, now, nack)

    def _go_on(self) -> None:
        """Have the writer send what the request asks for. Most requests are answers after which
        there is nothing to say: then it need not wake up, which would cost more than the rest."""
        current = self._generation is self._hub.generation
        if current and self.stream.level:
            self._hub.settle(self)
            return
        if self._idle is not None and current and self._may_send():
            self._planned = self.stream.next_response()
            if self._planned is None:
                self._settle()
                return
        self._wake()

    def _wake(self) -> None:
        """Have the writer look again whether there is anything to do."""
        idle, self._idle = self._idle, None
        if idle is not None and not idle.done():
            idle.set_result(None)

    def stays(self, old: Generation, new: Generation) -> bool:
        """Take over a generation that has nothing new for this client, if it has come as far as the
        old one; whether there is nothing to do for it."""
        if self._generation is not old:
            return False
        self._generation = new
        return self.stream.settled

    def offer(self, generation: Generation, snapshot: Snapshot | None) -> None:
        """Have the client brought to this generation; its snapshot is made if there is none yet."""
        if snapshot is not None:
            self._generation = generation
            self.stream.offer(snapshot)
        self._wake()

    async def write(self, context: Any) -> None:
        """Send what the client lacks, whenever anything changed.

        Each message is worked out only when the one before it was taken: a slow client is never
        sent a state that was overtaken meanwhile.
        """
        idle = asyncio.get_running_loop().create_future
        while not self._leaving:
            if self._generation is not self._hub.generation:
                await self.refresh()
            if self._planned is not None or not self.stream.awaits:
                if response := self._next():
                    await self._send(context, response)
                    continue
                self._settle()
            if self.closed:
                return
            self._idle = idle()
            await self._idle

    def _send(self, context: Any, response: Response) -> Awaitable[None]:
        """Have a message written, in its turn if it is large."""
        self._note_sent(response)
        if self._hub.room.passes(response.size):
            return context.write(response.body)  # type: ignore[no-any-return]
        return self._send_in_turn(context, response)

    async def _send_in_turn(self, context: Any, response: Response) -> None:
        async with self._hub.room.for_(response.size):
            await context.write(response.body)

    def _next(self) -> Response | None:
        planned, self._planned = self._planned, None
        if planned is not None:
            return planned
        return self.stream.next_response() if self._may_send() else None

    def _may_send(self) -> bool:
        """What a client does not answer is remembered: no more of it until answers come."""
        return self.stream.unanswered < self._limits.unanswered

    def _settle(self) -> None:
        if self.stream.settled and self._generation is self._hub.generation:
            self._hub.settle(self)

    async def refresh(self) -> None:
        """Offer the stream the current generation, if it has not been yet."""
        while self._generation is not self._hub.generation:
            generation = self._hub.generation
            snapshot = await self._hub.snapshot(generation, self.node)
            self._generation = generation
            self.stream.offer(snapshot)

    def _note_sent(self, response: Response) -> None:
        if response.size > MAX_RESPONSE_BYTES:
            log.warning(
                "%s is sent %d bytes of %s in one message, which cannot be split; gRPC's clients "
                "refuse more than 4 MiB unless told otherwise",
                self,
                response.size,
                kind(response.type_url),
            )
        self._sent[response.nonce] = _Sent(response.version, self._hub.clock())
        self._hub.tally.response_bytes[label(response.type_url)].add(response.size)
        self._hub.sent(self, response.nonce)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "%s sent %s (%s): %s, %d bytes",
                self,
                response.nonce,
                kind(response.type_url),
                _contents(response),
                response.size,
            )


def _answered(answer: Ack | Nack, took: float) -> str:
    return f"{answer.nonce} ({kind(answer.type_url)}) after {took * 1000:.1f} ms"


def _bound(
    request: DeltaDiscoveryRequest | DiscoveryRequest,
    stream: DeltaStream | SotwStream,
    limits: Limits,
) -> int:
    """How many names are asked for. Refused when the stream would have to keep too much."""
    fields = _names(request)
    asked = sum(map(len, fields))
    if not asked and request.type_url in ORDER:
        return asked
    if (
        isinstance(stream, SotwStream)
        and isinstance(request, DiscoveryRequest)
        and stream.repeats(request)
    ):
        return asked
    kept = stream.kept()
    if isinstance(request, DiscoveryRequest):
        # Its names take the place of those before.
        kept[request.type_url] = 0
    number = asked + sum(kept.values())
    most = limits.names + 4 * stream.offered
    if number > most:
        raise Refused(Reason.NAMES, f"asks for {number} names; {most} is the most")
    if max(map(len, chain((request.type_url,), *fields))) > limits.name_length:
        raise Refused(Reason.NAMES, f"asks for a name of more than {limits.name_length} characters")
    if len({*kept, request.type_url}) > limits.types:
        raise Refused(Reason.NAMES, f"asks for more than {limits.types} types")
    return asked


def _names(request: DeltaDiscoveryRequest | DiscoveryRequest) -> Sequence[Collection[str]]:
    """The fields of a request that hold names, which may be too many to be looked at."""
    if isinstance(request, DiscoveryRequest):
        return (request.resource_names,)
    return (
        request.resource_names_subscribe,
        request.resource_names_unsubscribe,
        request.initial_resource_versions,
    )


def _question(request: DeltaDiscoveryRequest | DiscoveryRequest) -> str:
    if isinstance(request, DiscoveryRequest):
        words = [("names", request.resource_names)]
    else:
        words = [
            ("subscribes", request.resource_names_subscribe),
            ("unsubscribes", request.resource_names_unsubscribe),
            ("has", request.initial_resource_versions),
        ]
    parts = [f"{word} {len(names)} ({listed(names)})" for word, names in words if names]
    return f"{kind(request.type_url)}: {', '.join(parts) or 'nothing by name'}"


def _contents(response: Response) -> str:
    parts = []
    if response.resources:
        names = listed(entry.name for entry in response.resources)
        parts.append(f"{len(response.resources)} ({names})")
    if response.removed:
        parts.append(f"{len(response.removed)} removed ({listed(response.removed)})")
    return ", ".join(parts) or "nothing"
