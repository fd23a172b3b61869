"""The state-of-the-world variant, rule by rule of the xDS protocol."""

import zlib
from base64 import b64encode
from collections.abc import Iterable

import pytest
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from worlds import Resources, world
from xds_server.exchange import Ack, Nack, Response
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE, kind
from xds_server.snapshot import Encoder, set_version
from xds_server.sotw import SotwStream
from xds_server.standing import Sync


class Talk:
    """A stream and the client's side of it: it repeats its names with every request."""

    def __init__(self, resources: Resources) -> None:
        self.stream = SotwStream()
        self.last: dict[str, Response] = {}
        self.names: dict[str, list[str]] = {}
        self.offer(resources)

    def offer(self, resources: Resources) -> None:
        self.stream.offer(Encoder().snapshot(resources))

    def ask(
        self,
        type_url: str,
        names: Iterable[str] = (),
        *,
        version: str = "",
        nonce: str | None = None,
        error: str | None = None,
    ) -> Ack | Nack | None:
        last = self.last.get(type_url)
        self.names[type_url] = list(names)
        request = DiscoveryRequest(
            type_url=type_url,
            resource_names=self.names[type_url],
            version_info=version,
            response_nonce=nonce if nonce is not None else last.nonce if last else "",
        )
        if error is not None:
            request.error_detail.message = error
        return self.stream.receive(request)

    def said(self) -> list[tuple[str, tuple[str, ...]]]:
        """All that the server has to say now: kind, names sent."""
        said = []
        while response := self.stream.next_response():
            self.last[response.type_url] = response
            said.append((kind(response.type_url), tuple(e.name for e in response.resources)))
        return said

    def ack(self, *type_urls: str) -> None:
        for type_url in type_urls or self.last:
            self.ask(type_url, self.names[type_url])


def connected(resources: Resources | None = None) -> Talk:
    """A client that has everything there is."""
    resources = world() if resources is None else resources
    talk = Talk(resources)
    talk.ask(CLUSTER)
    talk.ask(ENDPOINT, resources[ENDPOINT])
    talk.ask(LISTENER)
    talk.ask(ROUTE, resources[ROUTE])
    talk.said()
    talk.ack()
    assert talk.said() == []
    assert talk.stream.settled
    return talk


def test_response_on_the_wire_is_what_the_decoder_reads() -> None:
    talk = Talk(world())
    talk.ask(CLUSTER)
    response = talk.stream.next_response()
    assert response is not None
    read = DiscoveryResponse.FromString(response.body)
    assert (read.type_url, read.nonce, read.version_info) == (
        CLUSTER,
        response.nonce,
        response.version,
    )
    assert [any_.type_url for any_ in read.resources] == [CLUSTER]
    assert read.resources[0].value == world()[CLUSTER]["web"].SerializeToString()


def test_clusters_come_complete_endpoints_one_by_one() -> None:
    two = {"a": 0, "b": 0, "web": 0}
    talk = connected(world(clusters=two))
    talk.offer(world(clusters={**two, "a": 1}))
    assert talk.said() == [("cluster", ("a", "b", "web")), ("endpoints", ("a",))]
    talk.ack()
    talk.offer(world(clusters={**two, "a": 1}, ports={"b": 9000}))
    assert talk.said() == [("endpoints", ("b",))]


@pytest.mark.parametrize("names", [(), ("*",)])
def test_wildcard_by_legacy_and_by_name(names: tuple[str, ...]) -> None:
    talk = Talk(world(clusters={"a": 0, "b": 0}, routes={}, listeners={}))
    talk.ask(CLUSTER, names)
    assert talk.said() == [("cluster", ("a", "b"))]


def test_names_replace_the_wildcard_and_nothing_does_not_bring_it_back() -> None:
    talk = Talk(world(clusters={"a": 0, "b": 0}, routes={}, listeners={}))
    talk.ask(CLUSTER)
    talk.said()
    talk.ask(CLUSTER, ["*", "a"])
    assert talk.said() == [("cluster", ("a", "b"))]
    talk.ask(CLUSTER, ["a"])
    talk.offer(world(clusters={"a": 0, "b": 1}, routes={}, listeners={}))
    assert talk.said() == []
    talk.ask(CLUSTER)
    talk.offer(world(clusters={"a": 1, "b": 1}, routes={}, listeners={}))
    assert talk.said() == []


def test_new_name_is_sent_and_the_old_ones_are_not_again() -> None:
    talk = Talk(world(clusters={"a": 0, "b": 0}, routes={}, listeners={}))
    talk.ask(ENDPOINT, ["a"])
    assert talk.said() == [("endpoints", ("a",))]
    talk.ask(ENDPOINT, ["a", "b"])
    assert talk.said() == [("endpoints", ("b",))]


def test_name_dropped_and_taken_up_again_is_sent_again() -> None:
    talk = connected()
    talk.ask(ENDPOINT, ["other"])
    talk.ask(ENDPOINT, ["web"])
    assert talk.said() == [("endpoints", ("web",))]


def test_request_with_a_stale_nonce_says_nothing() -> None:
    talk = connected(world(clusters={"a": 0, "web": 0}))
    old = talk.last[ENDPOINT].nonce
    talk.offer(world(clusters={"a": 0, "web": 0}, ports={"a": 9000}))
    assert talk.said() == [("endpoints", ("a",))]
    assert talk.ask(ENDPOINT, ["a", "late", "web"], nonce=old) is None
    talk.offer(world(clusters={"a": 0, "late": 0, "web": 0}, ports={"a": 9000}))
    # The new cluster's endpoints come with it; those that the stale request named do not.
    assert ("endpoints", ("late",)) in talk.said()
    answer = talk.ask(ENDPOINT, ["a", "late", "web"])
    assert answer == Ack(ENDPOINT, talk.last[ENDPOINT].nonce)
    assert talk.said() == [("endpoints", ("late",))]


def test_nonce_of_another_stream_hides_no_first_request() -> None:
    talk = Talk(world())
    talk.ask(CLUSTER, nonce="7 of another stream")
    assert talk.said() == [("cluster", ("web",))]
    assert talk.ask(CLUSTER, nonce="7 of another stream") is None


def test_name_that_does_not_exist_is_sent_when_it_does() -> None:
    talk = Talk(world())
    talk.ask(ENDPOINT, ["late"])
    assert talk.said() == []
    talk.offer(world(clusters={"late": 0}, routes={}, listeners={}))
    assert talk.said() == [("endpoints", ("late",))]


def test_asking_for_a_cluster_that_does_not_exist_is_answered_with_none() -> None:
    talk = Talk(world())
    talk.ask(CLUSTER, ["nowhere"])
    assert talk.said() == [("cluster", ())]


def test_reconnect_with_the_same_version_is_sent_no_listeners_and_clusters() -> None:
    before = connected()
    talk = Talk(world())
    talk.ask(CLUSTER, version=before.last[CLUSTER].version)
    talk.ask(LISTENER, version=before.last[LISTENER].version)
    assert talk.said() == []
    assert talk.stream.settled is False  # its route is not asked for yet
    talk.offer(world(listeners={}))
    assert talk.said() == [("listener", ())]


def back(before: Talk, resources: Resources) -> Talk:
    """The same client on another stream, of another server perhaps."""
    talk = Talk(resources)
    for type_url in (CLUSTER, ENDPOINT, LISTENER, ROUTE):
        talk.ask(type_url, before.names[type_url], version=before.last[type_url].version)
    return talk


def test_reconnect_with_everything_is_sent_nothing() -> None:
    resources = world(clusters={"a": 0, "b": 0, "web": 0})
    before = connected(resources)
    # An answer, and no byte of resources.
    assert back(before, resources).said() == [("route", ())]
    before.ask(ENDPOINT, ["a", "web"])
    assert before.said() == [("endpoints", ())]
    before.ack()
    assert before.said() == []
    assert back(before, resources).said() == [("route", ())]


def test_reconnect_to_a_change_is_sent_the_whole_type() -> None:
    before = connected(world(clusters={"a": 0, "b": 0, "web": 0}))
    changed = world(clusters={"a": 0, "b": 0, "web": 0}, ports={"a": 9000})
    talk = back(before, changed)
    assert talk.said() == [("endpoints", ("a", "b", "web"))]
    talk.ack(ENDPOINT)
    talk.last = before.last | talk.last
    assert back(talk, changed).said() == [("route", ())]


def test_reconnect_before_a_clusters_endpoints_came_brings_them() -> None:
    """A cluster that changed warms until they come after it, be they the same."""
    before = connected()
    changed = world(clusters={"web": 1})
    before.offer(changed)
    response = before.stream.next_response()
    assert response is not None
    assert response.type_url == CLUSTER
    before.last[CLUSTER] = response
    assert back(before, changed).said() == [("endpoints", ("web",))]


def test_reconnect_with_a_name_more_is_sent_all_names() -> None:
    two = world(clusters={"a": 0, "web": 0})
    talk = Talk(two)
    talk.ask(CLUSTER)
    talk.ask(ENDPOINT, ["a"])
    talk.said()
    again = Talk(two)
    again.ask(CLUSTER, version=talk.last[CLUSTER].version)
    again.ask(ENDPOINT, ["a", "web"], version=talk.last[ENDPOINT].version)
    assert again.said() == [("endpoints", ("a", "web"))]


def test_part_of_what_there_is_is_another_version() -> None:
    """What a message of its own is still to bring is not taken for what the client has."""
    two = world(clusters={"a": 0, "web": 0})
    talk = Talk(two)
    talk.stream = SotwStream(limit=10)
    talk.offer(two)
    talk.ask(CLUSTER)
    talk.ask(ENDPOINT, ["a", "web"])
    for type_url in (CLUSTER, ENDPOINT):
        response = talk.stream.next_response()
        assert response is not None
        assert response.type_url == type_url
        talk.last[type_url] = response
    again = Talk(two)
    again.ask(CLUSTER, version=talk.last[CLUSTER].version)
    again.ask(ENDPOINT, ["a", "web"], version=talk.last[ENDPOINT].version)
    assert again.said() == [("endpoints", ("a", "web"))]


def test_who_drops_a_name_as_it_comes_back_is_told_what_it_has_then() -> None:
    before = connected()
    talk = Talk(world())
    for names in (["to-web"], []):
        talk.ask(ROUTE, names, version=before.last[ROUTE].version)
    assert talk.said() == [("route", ())]
    assert talk.last[ROUTE].version != before.last[ROUTE].version


def test_forgetful_client_is_sent_what_it_names() -> None:
    before = connected()
    talk = Talk(world())
    talk.stream.forgetful = True
    talk.ask(CLUSTER, version=before.last[CLUSTER].version)
    talk.ask(ENDPOINT, ["web"], version=before.last[ENDPOINT].version)
    assert talk.said() == [("endpoints", ("web",))]


def test_reconnect_with_an_old_version_is_sent_everything() -> None:
    before = connected()
    talk = Talk(world(clusters={"web": 1}))
    talk.ask(CLUSTER, version=before.last[CLUSTER].version)
    assert talk.said() == [("cluster", ("web",))]


def test_cluster_to_go_stays_until_the_new_route_is_acknowledged() -> None:
    talk = connected(world(clusters={"old": 0, "web": 0}, routes={"to-web": ("old", 0)}))
    talk.offer(world(clusters={"web": 1}))
    assert talk.said() == [
        ("cluster", ("web", "old")),
        ("endpoints", ("web",)),
        ("route", ("to-web",)),
    ]
    talk.ack()
    assert talk.said() == [("cluster", ("web",))]
    talk.ack()
    assert talk.said() == []
    assert talk.stream.settled


def test_listener_is_deleted_by_leaving_it_out() -> None:
    talk = connected()
    talk.offer(world(listeners={}))
    assert talk.said() == [("listener", ())]
    talk.ack()
    assert talk.said() == []


def test_nack_is_kept_and_does_not_loop() -> None:
    talk = connected()
    taken = Encoder().snapshot(world()).of(CLUSTER)
    talk.offer(world(clusters={"web": 1}))
    talk.said()
    version, nonce = talk.last[CLUSTER].version, talk.last[CLUSTER].nonce
    nack = Nack(CLUSTER, nonce, version, "bad")
    assert talk.ask(CLUSTER, error="bad") == nack
    talk.ack(ENDPOINT)
    # What it has, with a version that tells of the refusal when the client comes back.
    assert talk.said() == [("cluster", ("web",))]
    assert talk.last[CLUSTER].version == set_version(taken.values())
    talk.ack(CLUSTER)
    assert talk.said() == []
    assert talk.stream.rejected == (nack,)
    talk.offer(world())
    assert talk.said() == [("cluster", ("web",)), ("endpoints", ("web",))]
    talk.ack()
    assert not talk.stream.rejected


def test_refused_part_of_the_whole_is_found_and_stays_as_it_was() -> None:
    names = [f"c{n}" for n in range(8)]
    talk = connected(world(clusters={"web": 0, **dict.fromkeys(names, 0)}))
    new = world(clusters={"web": 0, "fresh": 0, **dict.fromkeys(names, 1)})
    talk.offer(new)
    bad = Encoder().snapshot(new).of(CLUSTER)["c3"]
    refusals = 0
    while talk.said():
        if bad in talk.last[CLUSTER].resources and talk.ask(CLUSTER, error="no"):
            refusals += 1
        talk.ack()
    assert refusals == 4
    assert [found.name for found in talk.stream.quarantined] == ["c3"]
    # The client keeps what it had of it; responses are complete all the same.
    new = world(clusters={"web": 1, "fresh": 0, **dict.fromkeys(names, 1)})
    talk.offer(new)
    assert talk.said()[0] == ("cluster", ("c0", "c1", "c2", "c3", *names[4:], "fresh", "web"))
    last = {entry.name: entry.version for entry in talk.last[CLUSTER].resources}
    wanted = {n: e.version for n, e in Encoder().snapshot(new).of(CLUSTER).items()}
    old = Encoder().snapshot(world(clusters=dict.fromkeys(names, 0), routes={}, listeners={}))
    assert last == {**wanted, "c3": old.of(CLUSTER)["c3"].version}
    talk.ack()
    assert talk.said() == []
    assert talk.stream.settled


def test_what_a_refused_listener_left_in_use_is_not_removed() -> None:
    old = world(
        clusters={"old": 0, "web": 0},
        routes={"to-old": ("old", 0)},
        listeners={"in": ("to-old", 0)},
    )
    talk = connected(old)
    talk.offer(world(listeners={"in": ("to-web", 1)}))
    assert talk.said() == [("listener", ("in",))]
    talk.ask(LISTENER, error="no")
    assert talk.said() == [("listener", ("in",))]
    talk.ack(LISTENER)
    assert talk.said() == []
    talk.offer(world(listeners={"in": ("to-web", 2)}))
    assert talk.said() == [("listener", ("in",))]
    talk.ack(LISTENER)
    talk.ask(ROUTE, ["to-web"])
    assert talk.said() == [("route", ("to-web",))]
    talk.ack(ROUTE)
    assert talk.said() == [("cluster", ("web",))]


def test_nothing_is_left_out_for_a_try_while_it_is_not_known_what_the_client_has() -> None:
    talk = Talk(world(clusters={"a": 1, "web": 1}))
    talk.ask(CLUSTER, version="from an earlier stream")
    assert talk.said() == [("cluster", ("a", "web"))]
    talk.ask(CLUSTER, error="no")
    assert talk.said() == []
    assert len(talk.stream.rejected) == 1
    talk.offer(world(clusters={"a": 2, "web": 1}))
    assert talk.said() == [("cluster", ("a", "web"))]


def test_what_a_client_in_an_unknown_state_names_is_told_and_not_left_out() -> None:
    talk = Talk(world(clusters={"a": 1, "b": 1, "web": 1}))
    talk.ask(CLUSTER, version="from an earlier stream")
    talk.said()
    talk.ask(CLUSTER, error="Error adding/updating cluster(s) b: no such filter")
    assert talk.said() == []
    (found,) = talk.stream.quarantined
    assert (found.name, found.error) == ("b", talk.stream.rejected[0].error)
    # It may have an earlier version of it, which to leave it out would delete.
    talk.offer(world(clusters={"a": 2, "b": 1, "web": 1}))
    assert talk.said() == [("cluster", ("a", "b", "web"))]
    talk.ask(CLUSTER, error="Error adding/updating cluster(s) b: no such filter, 2nd time")
    assert talk.said() == []
    talk.offer(world(clusters={"a": 2, "b": 2, "web": 1}))
    assert talk.said() == [("cluster", ("a", "b", "web"))]
    talk.ack()
    assert not talk.stream.rejected
    assert not talk.stream.quarantined


def wire_version(talk: Talk, type_url: str) -> str:
    """What the client was told, and says when it comes back."""
    return str(DiscoveryResponse.FromString(talk.last[type_url].body).version_info)


def refusing(resources: Resources, new: Resources) -> Talk:
    """A client that had `resources` and refuses cluster `a` of the new ones, without a name."""
    talk = connected(resources)
    talk.offer(new)
    bad = Encoder().snapshot(new).of(CLUSTER)["a"]
    while talk.said():
        if bad in talk.last[CLUSTER].resources:
            talk.ask(CLUSTER, error="no")
        talk.ack()
    return talk


def test_what_was_refused_is_known_when_the_client_comes_back() -> None:
    """Also to a server that has never heard of it."""
    new = world(clusters={"a": 1, "web": 1})
    before = refusing(world(clusters={"a": 0, "web": 0}), new)
    claimed = wire_version(before, CLUSTER)
    talk = Talk(new)
    talk.ask(CLUSTER, version=claimed)
    assert talk.said() == []
    (found,) = talk.stream.quarantined
    assert (found.name, found.error) == ("a", "no")
    assert talk.stream.sync(CLUSTER) is Sync.NACKED
    # Others are not held up, and the version that the client has stands in for the refused one.
    talk.offer(world(clusters={"a": 1, "web": 2}))
    assert talk.said()[0] == ("cluster", ("a", "web"))
    (stands_in, _) = talk.last[CLUSTER].resources
    assert stands_in == Encoder().snapshot(world(clusters={"a": 0})).of(CLUSTER)["a"]
    talk.ack()
    # Until it is another one.
    talk.offer(world(clusters={"a": 2, "web": 2}))
    talk.said()
    talk.ack()
    assert not talk.stream.rejected
    assert wire_version(talk, CLUSTER) == talk.last[CLUSTER].version
    # Another program at the client's place has nothing, and may take it.
    fresh = Talk(new)
    fresh.ask(CLUSTER)
    assert fresh.said()[0] == ("cluster", ("a", "web"))
    assert fresh.last[CLUSTER].resources[0].version == found.version


def test_who_comes_back_in_the_middle_of_a_search_has_it_gone_on_with() -> None:
    names = [f"c{n}" for n in range(8)]
    new = world(clusters=dict.fromkeys(["a", *names], 1), routes={}, listeners={})
    talk = Talk(world(clusters=dict.fromkeys(["a", *names], 0), routes={}, listeners={}))
    talk.ask(CLUSTER)
    talk.said()
    talk.ack()
    talk.offer(new)
    talk.said()
    talk.ask(CLUSTER, error="no")
    talk.said()
    talk.ack()
    again = Talk(new)
    again.ask(CLUSTER, version=wire_version(talk, CLUSTER))
    bad = Encoder().snapshot(new).of(CLUSTER)["c5"]
    while again.said():
        if bad in again.last[CLUSTER].resources:
            again.ask(CLUSTER, error="no")
        again.ack()
    assert [found.name for found in again.stream.quarantined] == ["c5"]
    has = {entry.name: entry.version for entry in again.last[CLUSTER].resources}
    wanted = Encoder().snapshot(new).of(CLUSTER).versions
    assert has == {**wanted, "c5": has["c5"]}
    assert has["c5"] != wanted["c5"]


def forged(text: bytes) -> str:
    return f"0123456789abcdef+{b64encode(zlib.compress(text)).decode()}"


@pytest.mark.parametrize(
    "claim",
    [
        "0+",
        "0+%",
        "0+AAAA",
        forged(b"[1]"),
        forged(b"["),
        forged(b"[[]]"),
        forged(b'[["a", "1", "e", true, "0123456789abcdef", "AAAA"]]'),
        forged(b'[["a", 1, [], true, null, null]]'),
        forged(b'[["a", "1", "e", true, null, null], {}]'),
        forged(b"[" * 100_000),
        forged(b" " * (64 << 20)),
        "+" * (1 << 20),
    ],
    ids=range(12),
)
def test_version_that_is_none_of_ours_is_one_that_is_not_known(claim: str) -> None:
    talk = Talk(world())
    talk.ask(CLUSTER, version=claim)
    assert talk.said() == [("cluster", ("web",))]
    talk.ack()
    assert not talk.stream.rejected


def test_endpoints_are_split_at_the_limit_and_clusters_cannot_be() -> None:
    two = world(clusters={"a": 0, "b": 0}, routes={}, listeners={})
    talk = Talk(two)
    talk.stream = SotwStream(limit=10)
    talk.offer(two)
    talk.ask(CLUSTER)
    talk.ask(ENDPOINT, ["a", "b"])
    assert talk.said() == [
        ("cluster", ("a", "b")),
        ("endpoints", ("a",)),
        ("endpoints", ("b",)),
    ]


def test_slow_client_skips_the_states_in_between() -> None:
    talk = connected()
    for variant in range(1, 30):
        talk.offer(world(clusters={"web": variant}))
    assert talk.said() == [("cluster", ("web",)), ("endpoints", ("web",))]


def test_route_that_is_gone_and_still_asked_for_holds_nothing_up() -> None:
    """A listener's chain that drains keeps its routes for minutes."""
    old = world(
        clusters={"old": 0, "web": 0},
        routes={"to-old": ("old", 0), "to-web": ("web", 0)},
        listeners={"in": ("to-old", 0)},
    )
    talk = connected(old)
    talk.offer(world())
    assert talk.said() == [("listener", ("in",))]
    talk.ack(LISTENER)
    assert talk.said() == [("cluster", ("web",))]
    talk.ack(CLUSTER)
    # When it comes back it is sent again.
    talk.offer(old)
    assert ("route", ("to-old",)) in talk.said()


def test_an_ack_that_lists_the_same_names_keeps_what_is_shared_and_a_longer_list_counts() -> None:
    stream = SotwStream()
    stream.offer(Encoder().snapshot(world(clusters={"web": 0, "api": 0})))
    names = ["web", "api"]
    stream.receive(DiscoveryRequest(type_url=ENDPOINT, resource_names=names))
    response = stream.next_response()
    assert response is not None
    ack = DiscoveryRequest(
        type_url=ENDPOINT,
        resource_names=names,
        response_nonce=response.nonce,
        version_info=response.version,
    )
    assert stream.repeats(ack)
    assert (ack.version_info, ack.response_nonce) == (response.version, response.nonce)
    assert stream.receive(ack) == Ack(ENDPOINT, response.nonce)
    assert stream.next_response() is None
    ack.resource_names.append("more")
    assert not stream.repeats(ack)
    ack.resource_names[:] = ["web"]
    stream.receive(ack)
    assert stream.kept()[ENDPOINT] == 1
    # The list of before is new again.
    ack.resource_names[:] = names
    left = stream.next_response()
    assert left is not None
    ack.response_nonce = left.nonce
    assert not stream.repeats(ack)
    stream.receive(ack)
    again = stream.next_response()
    assert again is not None
    assert [entry.name for entry in again.resources] == ["api"]
