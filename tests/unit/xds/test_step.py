"""A change of content only: what clients that are up to date are sent is worked out once."""

from collections.abc import Callable
from typing import Any

import pytest
from envoy.service.discovery.v3.discovery_pb2 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
)
from worlds import Resources, world
from xds_server.delta import DeltaStream
from xds_server.exchange import Ack, Nack, Response
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE
from xds_server.snapshot import Encoder, Snapshot
from xds_server.sotw import SotwStream
from xds_server.step import step

BEFORE = world()
MOVED = world(ports={"web": 9000})
MOVED_AGAIN = world(ports={"web": 9001})
ROUTED = world(routes={"to-web": ("web", 1)})
#: What a client asks for by name.
NAMES: dict[str, list[str]] = {CLUSTER: [], LISTENER: [], ENDPOINT: ["web"], ROUTE: ["to-web"]}


def snapshots(*worlds: Resources) -> list[Snapshot]:
    encoder = Encoder()
    return [encoder.snapshot(each) for each in worlds]


def delta(snapshot: Snapshot) -> DeltaStream:
    """A client that has all of it."""
    stream = DeltaStream()
    stream.offer(snapshot)
    for type_url, names in NAMES.items():
        stream.receive(DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=names))
    while response := stream.next_response():
        ack(stream, response)
    assert stream.settled
    return stream


def sotw(snapshot: Snapshot) -> SotwStream:
    """Likewise."""
    stream = SotwStream()
    stream.offer(snapshot)
    for type_url, names in NAMES.items():
        stream.receive(DiscoveryRequest(type_url=type_url, resource_names=names))
    while response := stream.next_response():
        assert isinstance(sotw_ack(stream, response), Ack)
    assert stream.settled
    return stream


def ack(stream: DeltaStream, response: Response) -> Ack | Nack | None:
    return stream.receive(
        DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
    )


def sotw_ack(stream: SotwStream, response: Response) -> Ack | Nack | None:
    request = DiscoveryRequest(
        type_url=response.type_url,
        response_nonce=response.nonce,
        version_info=response.version,
        resource_names=NAMES[response.type_url],
    )
    return stream.receive(request)


def taken(stream: DeltaStream | SotwStream) -> Response:
    response = stream.next_response()
    assert response is not None
    return response


@pytest.mark.parametrize(("variant", "answer"), [(delta, ack), (sotw, sotw_ack)])
def test_who_took_a_larger_change_takes_the_next_step_with_all_others(
    variant: Callable[[Snapshot], Any], answer: Callable[[Any, Response], Ack | Nack | None]
) -> None:
    larger = world(clusters={"web": 1}, ports={"web": 9000})
    before, after = snapshots(BEFORE, larger)
    stream = variant(before)
    stream.offer(after)
    while response := stream.next_response():
        answer(stream, response)
    assert stream.level


@pytest.mark.parametrize(("after", "type_url"), [(MOVED, ENDPOINT), (ROUTED, ROUTE)])
@pytest.mark.parametrize("variant", [delta, sotw])
def test_clients_that_are_up_to_date_share_the_response(
    after: Resources, type_url: str, variant: Callable[[Snapshot], Any]
) -> None:
    old, new = snapshots(BEFORE, after)
    streams = [variant(old) for _ in range(3)]
    for stream in streams:
        stream.offer(new)
    first, *others = [taken(stream) for stream in streams]
    assert first.type_url == type_url
    assert all(other is first for other in others)
    book = ack if variant is delta else sotw_ack
    for stream in streams:
        assert stream.next_response() is None
        assert not stream.settled
        assert book(stream, first) == Ack(type_url, first.nonce)
        assert stream.settled
        assert stream.next_response() is None


def test_clients_with_different_pasts_come_to_the_same_nonce() -> None:
    old, between, new = snapshots(BEFORE, MOVED, MOVED_AGAIN)
    late, early = delta(between), delta(old)
    early.offer(between)
    before = taken(early)
    ack(early, before)
    for stream in (early, late):
        stream.offer(new)
    first = taken(early)
    assert taken(late) is first
    message = DeltaDiscoveryResponse.FromString(first.body)
    assert [resource.name for resource in message.resources] == ["web"]
    assert message.nonce == first.nonce != before.nonce


def test_a_nonce_comes_only_once_in_a_stream() -> None:
    old, new = snapshots(BEFORE, MOVED)
    short, long = delta(old), delta(old)
    nonces = []
    for snapshot in (new, old, new, old):
        long.offer(snapshot)
        response = taken(long)
        nonces.append(response.nonce)
        ack(long, response)
    assert len(set(nonces)) == len(nonces)
    # The other way round, too: the message that is there is too old for one of them.
    short.offer(new)
    ack(short, taken(short))
    long.offer(new)
    assert taken(long).nonce not in nonces


def plain(response: Response) -> DeltaDiscoveryRequest:
    return DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)


def plain_sotw(response: Response) -> DiscoveryRequest:
    return DiscoveryRequest(
        type_url=response.type_url,
        response_nonce=response.nonce,
        version_info=response.version,
        resource_names=NAMES[response.type_url],
    )


@pytest.mark.parametrize(("variant", "answer"), [(delta, plain), (sotw, plain_sotw)])
def test_an_answer_that_says_nothing_else_is_told_by_its_bytes(
    variant: Callable[[Snapshot], Any], answer: Callable[[Response], Any]
) -> None:
    old, new = snapshots(BEFORE, MOVED)
    stream = variant(old)
    stream.offer(new)
    response = taken(stream)
    request = answer(response).SerializeToString()
    assert stream.take_plain_ack(request) == Ack(ENDPOINT, response.nonce)
    assert stream.settled
    # It answers only once.
    assert stream.take_plain_ack(request) is None


@pytest.mark.parametrize(
    ("variant", "request_"),
    [
        (delta, DeltaDiscoveryRequest(resource_names_subscribe=["more"])),
        (delta, DeltaDiscoveryRequest(resource_names_unsubscribe=["web"])),
        (delta, DeltaDiscoveryRequest(initial_resource_versions={"web": "1"})),
        (delta, DeltaDiscoveryRequest(error_detail={"message": "no"})),
        (delta, DeltaDiscoveryRequest(type_url=ROUTE)),
        (delta, DeltaDiscoveryRequest(response_nonce="1")),
        (sotw, DiscoveryRequest(resource_names=["web", "more"])),
        (sotw, DiscoveryRequest(error_detail={"message": "no"})),
        (sotw, DiscoveryRequest(type_url=ROUTE)),
        (sotw, DiscoveryRequest(version_info="1")),
        (sotw, DiscoveryRequest(response_nonce="1")),
    ],
)
def test_an_answer_that_says_more_is_read(
    variant: Callable[[Snapshot], Any], request_: DeltaDiscoveryRequest | DiscoveryRequest
) -> None:
    old, new = snapshots(BEFORE, MOVED)
    stream = variant(old)
    stream.offer(new)
    response = taken(stream)
    request = plain(response) if variant is delta else plain_sotw(response)
    request.MergeFrom(request_)
    assert stream.take_plain_ack(request.SerializeToString()) is None
    assert stream.take_plain_ack(b"") is None
    assert not stream.settled


def test_a_client_that_has_not_answered_yet_is_sent_what_it_lacks_then() -> None:
    old, between, new = snapshots(BEFORE, MOVED, MOVED_AGAIN)
    stream = delta(old)
    stream.offer(between)
    first = taken(stream)
    stream.offer(new)
    second = taken(stream)
    assert [entry.version for entry in second.resources] == [new.of(ENDPOINT)["web"].version]
    assert not stream.settled
    assert ack(stream, first) == Ack(ENDPOINT, first.nonce)
    assert not stream.settled
    assert ack(stream, second) == Ack(ENDPOINT, second.nonce)
    assert stream.next_response() is None
    assert stream.settled


def test_an_answer_after_the_next_change_came_leads_on_from_there() -> None:
    old, between, new = snapshots(BEFORE, MOVED, MOVED_AGAIN)
    stream = delta(old)
    stream.offer(between)
    first = taken(stream)
    stream.offer(new)
    ack(stream, first)
    assert not stream.settled
    second = taken(stream)
    assert [entry.version for entry in second.resources] == [new.of(ENDPOINT)["web"].version]
    ack(stream, second)
    assert stream.settled


def test_a_refusal_is_the_clients_own() -> None:
    old, new = snapshots(BEFORE, ROUTED)
    good, bad = delta(old), delta(old)
    for stream in (good, bad):
        stream.offer(new)
    response = taken(good)
    assert taken(bad) is response
    refusal = DeltaDiscoveryRequest(type_url=ROUTE, response_nonce=response.nonce)
    refusal.error_detail.message = "no"
    assert isinstance(bad.receive(refusal), Nack)
    ack(good, response)
    assert good.settled
    assert good.quarantined == ()
    assert [found.name for found in bad.quarantined] == ["to-web"]
    # What it refused is not what the next change starts from.
    bad.offer(old)
    good.offer(old)
    assert taken(good).resources == (old.of(ROUTE)["to-web"],)
    assert taken(bad).resources == (old.of(ROUTE)["to-web"],)


def test_a_cluster_that_a_route_left_stays_until_the_client_has_taken_the_route() -> None:
    both = {"web": 0, "old": 0}
    old, moved, without = snapshots(
        world(clusters=both, routes={"to-web": ("old", 0)}),
        world(clusters=both, routes={"to-web": ("web", 0)}),
        world(),
    )
    stream = DeltaStream()
    stream.offer(old)
    for type_url, names in NAMES.items():
        names = ["old", *names] if type_url == ENDPOINT else names
        stream.receive(DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=names))
    while response := stream.next_response():
        ack(stream, response)
    stream.offer(moved)
    route = taken(stream)
    assert route.type_url == ROUTE
    stream.offer(without)
    assert stream.next_response() is None
    ack(stream, route)
    removal = taken(stream)
    assert (removal.type_url, removal.removed) == (CLUSTER, ("old",))


def test_what_else_a_subscription_asks_for_is_not_forgotten() -> None:
    old, new = snapshots(BEFORE, MOVED)
    stream = delta(old)
    stream.offer(new)
    response = taken(stream)
    answer = DeltaDiscoveryRequest(type_url=ENDPOINT, response_nonce=response.nonce)
    answer.resource_names_subscribe.append("web")
    assert stream.receive(answer) == Ack(ENDPOINT, response.nonce)
    assert [entry.name for entry in taken(stream).resources] == ["web"]


@pytest.mark.parametrize(
    "after",
    [
        world(clusters={"web": 1}),
        world(listeners={"in": ("to-web", 1)}),
        world(ports={"web": 9000}, routes={"to-web": ("web", 1)}),
        world(clusters={"web": 0, "more": 0}),
        world(routes={"to-web": ("web", 0), "more": ("web", 0)}),
        world(),
    ],
    ids=["cluster", "listener", "two types", "another cluster", "another route", "nothing"],
)
def test_what_leads_to_more_is_no_step(after: Resources) -> None:
    old, new = snapshots(BEFORE, after)
    assert step(old, new) is None
