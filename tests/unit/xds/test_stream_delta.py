"""The incremental variant, rule by rule of the xDS protocol."""

from collections.abc import Iterable, Mapping

import pytest
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from worlds import Resources, world
from xds_server.delta import DeltaStream
from xds_server.exchange import Ack, Nack, Response
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE, kind
from xds_server.snapshot import Encoder

Said = tuple[str, tuple[str, ...], tuple[str, ...]]


class Talk:
    """A stream and the client's side of it, spelled short."""

    def __init__(self, resources: Resources | None = None) -> None:
        self.stream = DeltaStream()
        self.last: dict[str, Response] = {}
        if resources is not None:
            self.offer(resources)

    def offer(self, resources: Resources) -> None:
        self.stream.offer(Encoder().snapshot(resources))

    def ask(
        self,
        type_url: str,
        subscribe: Iterable[str] = (),
        unsubscribe: Iterable[str] = (),
        known: Mapping[str, str] | None = None,
    ) -> None:
        self.stream.receive(
            DeltaDiscoveryRequest(
                type_url=type_url,
                resource_names_subscribe=subscribe,
                resource_names_unsubscribe=unsubscribe,
                initial_resource_versions=known or {},
            )
        )

    def ack(self, type_url: str, nonce: str | None = None) -> Ack | Nack | None:
        nonce = nonce or self.last[type_url].nonce
        return self.stream.receive(DeltaDiscoveryRequest(type_url=type_url, response_nonce=nonce))

    def nack(self, type_url: str, error: str = "no") -> Ack | Nack | None:
        request = DeltaDiscoveryRequest(type_url=type_url, response_nonce=self.last[type_url].nonce)
        request.error_detail.message = error
        return self.stream.receive(request)

    def said(self) -> list[Said]:
        """All that the server has to say now: kind, names sent, names removed."""
        said = []
        while response := self.stream.next_response():
            self.last[response.type_url] = response
            names = tuple(entry.name for entry in response.resources)
            said.append((kind(response.type_url), names, response.removed))
        return said

    def ack_all(self) -> None:
        for type_url in self.last:
            self.ack(type_url)


def connected(resources: Resources | None = None) -> Talk:
    """A client that has everything there is, as Envoy comes to have it."""
    resources = world() if resources is None else resources
    talk = Talk(resources)
    talk.ask(CLUSTER)
    talk.said()
    talk.ask(ENDPOINT, resources[ENDPOINT])
    talk.said()
    talk.ask(LISTENER)
    talk.said()
    talk.ask(ROUTE, resources[ROUTE])
    talk.said()
    talk.ack_all()
    assert talk.said() == []
    assert talk.stream.settled
    return talk


def versions(resources: Resources, type_url: str) -> dict[str, str]:
    entries = Encoder().snapshot(resources).of(type_url)
    return {name: entry.version for name, entry in entries.items()}


def test_response_on_the_wire_is_what_the_decoder_reads() -> None:
    talk = Talk(world())
    talk.ask(CLUSTER, ["*", "nowhere"])
    response = talk.stream.next_response()
    assert response is not None
    read = DeltaDiscoveryResponse.FromString(response.body)
    assert (read.type_url, read.nonce) == (CLUSTER, response.nonce)
    assert read.system_version_info == response.version
    assert [(r.name, r.version) for r in read.resources] == [
        ("web", versions(world(), CLUSTER)["web"])
    ]
    assert read.resources[0].resource.type_url == CLUSTER
    assert read.resources[0].resource.value == world()[CLUSTER]["web"].SerializeToString()
    assert list(read.removed_resources) == ["nowhere"]


@pytest.mark.parametrize("names", [(), ("*",)])
def test_wildcard_by_legacy_and_by_name(names: tuple[str, ...]) -> None:
    talk = Talk(world(clusters={"a": 0, "b": 0}, routes={}, listeners={}))
    talk.ask(CLUSTER, names)
    assert talk.said() == [("cluster", ("a", "b"), ())]


def test_first_wildcard_is_answered_even_with_nothing() -> None:
    talk = Talk(world(clusters={}, routes={}, listeners={}))
    talk.ask(CLUSTER)
    assert talk.said() == [("cluster", (), ())]


def test_empty_request_is_no_wildcard_for_endpoints() -> None:
    talk = Talk(world())
    talk.ask(ENDPOINT)
    assert talk.said() == []


def test_emptied_subscription_does_not_fall_back_to_the_wildcard() -> None:
    talk = Talk(world())
    talk.ask(CLUSTER, ["web"])
    assert talk.said() == [("cluster", ("web",), ())]
    talk.ask(CLUSTER, unsubscribe=["web"])
    talk.ask(CLUSTER)
    assert talk.said() == []


def test_names_beside_a_wildcard_continue_it() -> None:
    talk = Talk(world(clusters={"a": 0, "b": 0}, routes={}, listeners={}))
    talk.ask(CLUSTER)
    talk.said()
    talk.ask(CLUSTER, ["a"])
    assert talk.said() == [("cluster", ("a",), ())]
    talk.ack_all()
    talk.ask(CLUSTER, unsubscribe=["*"])
    talk.offer(world(clusters={"a": 1, "b": 1}, routes={}, listeners={}))
    assert talk.said() == [("cluster", ("a",), ())]


def test_unsubscribing_a_name_under_a_wildcard_is_answered() -> None:
    talk = Talk(world())
    talk.ask(CLUSTER, ["*", "web", "nowhere"])
    talk.said()
    talk.ask(CLUSTER, unsubscribe=["web", "nowhere"])
    assert talk.said() == [("cluster", ("web",), ("nowhere",))]


def test_unsubscribing_what_was_never_asked_for_says_nothing() -> None:
    talk = connected()
    talk.ask(ENDPOINT, unsubscribe=["never"])
    assert talk.said() == []


def test_subscribed_name_that_does_not_exist_is_reported_once_then_sent_when_it_does() -> None:
    talk = connected()
    talk.ask(ENDPOINT, ["later"])
    assert talk.said() == [("endpoints", (), ("later",))]
    talk.ack_all()
    assert talk.said() == []
    talk.offer(world(clusters={"web": 0, "later": 0}))
    assert talk.said() == [("cluster", ("later",), ()), ("endpoints", ("later",), ())]


def test_subscribing_again_sends_again() -> None:
    talk = connected()
    talk.ask(ENDPOINT, ["web"])
    assert talk.said() == [("endpoints", ("web",), ())]


def test_unsubscribed_is_not_sent_any_more() -> None:
    talk = connected()
    talk.ask(ENDPOINT, unsubscribe=["web"])
    talk.offer(world(ports={"web": 9000}))
    assert talk.said() == []


def test_reconnect_with_the_same_versions_is_sent_nothing() -> None:
    talk = Talk(world())
    talk.ask(ENDPOINT, ["web"], known=versions(world(), ENDPOINT))
    talk.ask(CLUSTER, known=versions(world(), CLUSTER))
    talk.ask(ENDPOINT, ["web"], known=versions(world(), ENDPOINT))
    talk.ask(LISTENER, known=versions(world(), LISTENER))
    talk.ask(ROUTE, ["to-web"], known=versions(world(), ROUTE))
    # Envoy stays away longer after each stream on which nothing came.
    assert talk.said() == [("route", (), ())]
    talk.ack_all()
    assert talk.said() == []
    assert talk.stream.settled


def test_reconnect_is_sent_what_changed_and_told_what_is_gone() -> None:
    old = world(clusters={"gone": 0, "same": 0, "web": 0})
    talk = Talk(world(clusters={"new": 0, "same": 0, "web": 1}))
    talk.ask(CLUSTER, known=versions(old, CLUSTER))
    assert talk.said() == [("cluster", ("new", "web"), ())]
    talk.ack_all()
    # Its listeners and routes are yet to be heard of.
    assert talk.said() == []
    talk.ask(LISTENER, known=versions(old, LISTENER))
    talk.ask(ENDPOINT, ["web"], known=versions(old, ENDPOINT))
    assert talk.said() == [("endpoints", ("new", "web"), ())]
    talk.ack_all()
    assert talk.said() == []
    talk.ask(ROUTE, ["to-web"], known=versions(old, ROUTE))
    assert talk.said() == [("cluster", (), ("gone",))]


def test_reconnect_loses_listeners_before_their_clusters() -> None:
    old = world(clusters={"gone": 0, "web": 0})
    talk = Talk(world(clusters={"web": 0}, listeners={}))
    talk.ask(CLUSTER, known=versions(old, CLUSTER))
    assert talk.said() == [("cluster", (), ())]
    talk.ask(LISTENER, known=versions(old, LISTENER))
    assert talk.said()[0] == ("listener", (), tuple(sorted(versions(old, LISTENER))))


def test_only_what_changed_is_sent() -> None:
    talk = connected(world(clusters={"a": 0, "web": 0}))
    talk.offer(world(clusters={"a": 0, "web": 0}, ports={"a": 9000}))
    assert talk.said() == [("endpoints", ("a",), ())]


def test_order_of_a_large_change() -> None:
    talk = connected()
    talk.offer(
        world(
            clusters={"new": 0, "web": 1},
            routes={"to-web": ("new", 0)},
            listeners={"in": ("to-web", 1)},
        )
    )
    assert talk.said() == [
        ("cluster", ("new", "web"), ()),
        ("endpoints", ("new", "web"), ()),
        ("listener", ("in",), ()),
    ]
    # What it leads to newly is taken first.
    talk.ack(CLUSTER)
    assert talk.said() == [("route", ("to-web",), ())]


def test_route_to_a_changed_cluster_does_not_wait() -> None:
    talk = connected()
    talk.offer(world(clusters={"web": 1}, routes={"to-web": ("web", 1)}))
    assert talk.said() == [
        ("cluster", ("web",), ()),
        ("endpoints", ("web",), ()),
        ("route", ("to-web",), ()),
    ]


def test_new_route_does_not_wait_for_its_cluster() -> None:
    """A listener may wait for it, with routes to other clusters in it."""
    talk = connected()
    talk.ask(ROUTE, ["fresh"])
    talk.offer(
        world(
            clusters={"new": 0, "web": 0},
            routes={"to-web": ("web", 0), "fresh": ("new", 0)},
        )
    )
    assert ("route", ("fresh",), ()) in talk.said()


def test_changed_cluster_gets_its_unchanged_endpoints_again() -> None:
    talk = connected()
    talk.offer(world(clusters={"web": 1}))
    assert talk.said() == [("cluster", ("web",), ()), ("endpoints", ("web",), ())]


def test_removal_waits_until_the_new_route_is_acknowledged() -> None:
    talk = connected(world(clusters={"old": 0, "web": 0}, routes={"to-web": ("old", 0)}))
    talk.offer(world())
    assert talk.said() == [("route", ("to-web",), ())]
    talk.ack(ROUTE)
    assert talk.said() == [("cluster", (), ("old",))]
    talk.ack(CLUSTER)
    assert talk.said() == [("endpoints", (), ("old",))]
    talk.ack(ENDPOINT)
    assert talk.said() == []
    assert talk.stream.settled


def test_removal_waits_until_the_client_asked_for_the_listeners_new_route() -> None:
    talk = connected(world(clusters={"old": 0, "web": 0}, routes={"to-web": ("old", 0)}))
    talk.offer(world(routes={"fresh": ("web", 0)}, listeners={"in": ("fresh", 1)}))
    assert talk.said() == [("listener", ("in",), ())]
    talk.ack(LISTENER)
    assert talk.said() == []
    assert not talk.stream.settled
    talk.ask(ROUTE, ["fresh"], unsubscribe=["to-web"])
    assert talk.said() == [("route", ("fresh",), ())]
    talk.ack(ROUTE)
    assert talk.said() == [("cluster", (), ("old",))]


def test_removed_listener_goes_together_with_its_successor() -> None:
    talk = connected()
    talk.offer(world(listeners={"renamed": ("to-web", 0)}))
    assert talk.said() == [("listener", ("renamed",), ("in",))]


def test_removal_called_off() -> None:
    talk = connected(world(clusters={"old": 0, "web": 0}))
    talk.offer(world(routes={"to-web": ("web", 1)}))
    assert talk.said() == [("route", ("to-web",), ())]
    talk.offer(world(clusters={"old": 0, "web": 0}, routes={"to-web": ("web", 1)}))
    talk.ack(ROUTE)
    assert talk.said() == []


def test_nack_is_kept_and_does_not_loop() -> None:
    talk = connected()
    talk.offer(world(routes={"to-web": ("web", 1)}))
    talk.said()
    version, nonce = talk.last[ROUTE].version, talk.last[ROUTE].nonce
    nack = Nack(ROUTE, nonce, version, "bad regex")
    assert talk.nack(ROUTE, "bad regex") == nack
    assert talk.said() == []
    assert talk.stream.rejected == (nack,)
    assert talk.stream.settled
    talk.offer(world(routes={"to-web": ("web", 0)}))
    assert talk.said() == [("route", ("to-web",), ())]
    assert talk.ack(ROUTE) == Ack(ROUTE, talk.last[ROUTE].nonce)
    assert not talk.stream.rejected


def test_what_a_refused_route_left_in_use_is_not_removed() -> None:
    clusters = {"old": 0, "other": 0, "web": 0}
    talk = connected(world(clusters=clusters, routes={"to-web": ("old", 0)}))
    talk.offer(world())
    assert talk.said() == [("route", ("to-web",), ())]
    talk.nack(ROUTE)
    # The route of before leads to it; what nothing leads to goes.
    assert talk.said() == [("cluster", (), ("other",))]
    talk.ack(CLUSTER)
    assert talk.said() == [("endpoints", (), ("other",))]
    talk.ack(ENDPOINT)
    assert talk.said() == []
    assert talk.stream.settled
    talk.offer(world(routes={"to-web": ("web", 2)}))
    talk.said()
    talk.ack(ROUTE)
    assert talk.said() == [("cluster", (), ("old",))]


@pytest.mark.parametrize("asks", [False, True])
def test_what_a_refused_listener_left_in_use_is_not_removed(asks: bool) -> None:
    old = world(
        clusters={"old": 0, "web": 0},
        routes={"to-old": ("old", 0)},
        listeners={"in": ("to-old", 0)},
    )
    talk = connected(old)
    talk.offer(world(listeners={"in": ("to-web", 1)}))
    assert talk.said() == [("listener", ("in",), ())]
    talk.nack(LISTENER)
    assert talk.said() == []
    if asks:
        # Told that its route is gone, the client keeps it: Envoy's RDS takes no removal.
        talk.ask(ROUTE, ["to-old"])
        assert talk.said() == [("route", (), ("to-old",))]
        talk.ack(ROUTE)
        assert talk.said() == []
    assert talk.stream.settled
    talk.offer(world(listeners={"in": ("to-web", 2)}))
    assert talk.said() == [("listener", ("in",), ())]
    talk.ack(LISTENER)
    talk.ask(ROUTE, ["to-web"], unsubscribe=["to-old"])
    assert talk.said() == [("route", ("to-web",), ())]
    talk.ack(ROUTE)
    assert talk.said() == [("cluster", (), ("old",))]


def test_after_a_reconnect_nothing_goes_while_it_is_not_known_what_a_refused_route_leaves() -> None:
    old = world(clusters={"old": 0, "web": 0}, routes={"to-web": ("old", 0)})
    talk = Talk(world())
    for type_url in (CLUSTER, LISTENER):
        talk.ask(type_url, known=versions(old, type_url))
    for type_url in (ENDPOINT, ROUTE):
        talk.ask(type_url, old[type_url], known=versions(old, type_url))
    assert talk.said() == [("route", ("to-web",), ())]
    talk.nack(ROUTE)
    assert talk.said() == []
    talk.offer(world(routes={"to-web": ("web", 2)}))
    talk.said()
    talk.ack(ROUTE)
    assert talk.said() == [("cluster", (), ("old",))]


def test_strange_nonce_answers_nothing_but_its_subscription_counts() -> None:
    talk = connected()
    answer = talk.stream.receive(
        DeltaDiscoveryRequest(
            type_url=ENDPOINT, response_nonce="stale", resource_names_subscribe=["web"]
        )
    )
    assert answer is None
    assert talk.said() == [("endpoints", ("web",), ())]


def test_acknowledging_twice_answers_once() -> None:
    talk = connected()
    talk.offer(world(ports={"web": 9000}))
    talk.said()
    assert talk.ack(ENDPOINT) is not None
    assert talk.ack(ENDPOINT) is None


def test_slow_client_skips_the_states_in_between() -> None:
    talk = connected()
    for port in range(9000, 9050):
        talk.offer(world(ports={"web": port}))
    assert talk.said() == [("endpoints", ("web",), ())]
    assert (
        talk.last[ENDPOINT].resources[0].version
        == versions(world(ports={"web": 9049}), ENDPOINT)["web"]
    )
    for port in (1, 9049):
        talk.offer(world(ports={"web": port}))
    assert talk.said() == []


def test_type_that_is_not_served_is_reported_absent() -> None:
    talk = Talk(world())
    talk.ask("type.googleapis.com/envoy.service.runtime.v3.Runtime", ["layer"])
    assert talk.said() == [("Runtime", (), ("layer",))]


def test_nothing_is_said_before_a_state_is_offered() -> None:
    talk = Talk()
    talk.ask(CLUSTER)
    assert talk.said() == []
    talk.offer(world())
    assert talk.said() == [("cluster", ("web",), ())]


def test_cluster_changed_while_away_gets_its_endpoints_even_if_the_client_says_it_has_them() -> (
    None
):
    talk = Talk(world(clusters={"web": 1}))
    talk.ask(CLUSTER, known=versions(world(), CLUSTER))
    assert talk.said() == [("cluster", ("web",), ())]
    talk.ask(ENDPOINT, ["web"], known=versions(world(), ENDPOINT))
    assert talk.said() == [("endpoints", ("web",), ())]


def refused(talk: Talk, bad: set[str], error: str = "no") -> int:
    """Answers clusters until nothing more is said, refusing those; how many refusals that took."""
    refusals = 0
    while talk.said():
        names = set(talk.last[CLUSTER].versions())
        if names & bad and talk.nack(CLUSTER, error):
            refusals += 1
        talk.ack_all()
    return refusals


def many(variant: int) -> Resources:
    return world(clusters={"web": 0, **{f"c{n:03}": variant for n in range(64)}})


@pytest.mark.parametrize(
    ("error", "refusals"),
    [
        ("Proto constraint validation failed", 7),
        ("Error adding/updating cluster(s) c031: no such filter", 2),
        # A name that is mentioned without being meant costs a round, and nothing else.
        ("c030 is fine", 8),
        ("c03", 7),
    ],
)
def test_bad_resource_is_found_and_the_others_are_taken(error: str, refusals: int) -> None:
    talk = connected(many(0))
    talk.offer(many(1))
    assert refused(talk, {"c031"}, error) == refusals
    (found,) = talk.stream.quarantined
    assert (found.type_url, found.name, found.error) == (CLUSTER, "c031", error)
    assert found.version == versions(many(1), CLUSTER)["c031"]
    assert talk.stream.settled
    assert talk.said() == []


def test_several_bad_resources_are_found() -> None:
    talk = connected(many(0))
    talk.offer(many(1))
    bad = {"c001", "c002", "c063"}
    refused(talk, bad)
    assert {found.name for found in talk.stream.quarantined} == bad


def test_quarantine_ends_when_the_resource_changes_or_goes() -> None:
    talk = connected(world(clusters={"a": 0, "b": 0, "web": 0}))
    talk.offer(world(clusters={"a": 1, "b": 1, "web": 0}))
    refused(talk, {"a", "b"})
    assert [found.name for found in talk.stream.quarantined] == ["a", "b"]
    # Everything else goes on.
    talk.offer(world(clusters={"a": 1, "b": 1, "web": 2}))
    assert talk.said() == [("cluster", ("web",), ()), ("endpoints", ("web",), ())]
    talk.ack_all()
    assert len(talk.stream.rejected) == 1
    talk.offer(world(clusters={"a": 2, "web": 2}))
    assert talk.said() == [("cluster", ("a",), ()), ("endpoints", ("a",), ())]
    talk.ack_all()
    assert talk.said() == [("cluster", (), ("b",))]
    assert talk.stream.quarantined == ()
    assert talk.stream.rejected == ()


def test_part_that_was_overtaken_is_not_tried_again() -> None:
    talk = connected(world(clusters={"a": 0, "b": 0, "web": 0}))
    talk.offer(world(clusters={"a": 1, "b": 1, "web": 0}))
    talk.said()
    first = talk.last[CLUSTER]
    talk.offer(world(clusters={"a": 2, "b": 1, "web": 0}))
    assert talk.said()[0] == ("cluster", ("a",), ())
    talk.ack(CLUSTER)
    talk.last[CLUSTER] = first
    talk.nack(CLUSTER)
    # It may have been `a` alone that was wrong.
    assert talk.said() == [("cluster", ("b",), ()), ("endpoints", ("b",), ())]
    talk.ack_all()
    assert talk.stream.quarantined == ()


def test_route_to_a_refused_new_cluster_stays_as_it_was() -> None:
    talk = connected(world(clusters={"old": 0, "web": 0}, routes={"to-web": ("old", 0)}))
    talk.offer(world(clusters={"bad": 0, "web": 0}, routes={"to-web": ("bad", 0)}))
    assert talk.said() == [("cluster", ("bad",), ()), ("endpoints", ("bad",), ())]
    talk.nack(CLUSTER)
    talk.ack(ENDPOINT)
    assert talk.said() == []
    assert talk.stream.settled
    talk.offer(world(clusters={"bad": 1, "web": 0}, routes={"to-web": ("bad", 0)}))
    talk.said()
    talk.ack_all()
    assert talk.said() == [("route", ("to-web",), ())]
    talk.ack(ROUTE)
    assert talk.said() == [("cluster", (), ("old",))]


def test_message_holds_no_more_than_its_limit() -> None:
    talk = Talk()
    talk.stream = DeltaStream(limit=2000)
    talk.offer(many(0))
    talk.ask(CLUSTER)
    bodies, names = [], []
    while (response := talk.stream.next_response()) is not None:
        if response.type_url == CLUSTER:
            bodies.append(response.body)
            names += response.versions()
    assert max(map(len, bodies)) <= 2000
    assert len(bodies) > 2
    assert sorted(names) == sorted(many(0)[CLUSTER])


def test_resource_beyond_the_limit_goes_alone() -> None:
    talk = Talk()
    talk.stream = DeltaStream(limit=10)
    talk.offer(world(clusters={"a": 0, "web": 0}))
    talk.ask(CLUSTER)
    assert talk.said() == [("cluster", ("a",), ()), ("cluster", ("web",), ())]


def test_refused_resource_that_is_removed_does_not_hold_up_removals() -> None:
    talk = connected()
    talk.offer(world(clusters={"bad": 0, "web": 0}))
    talk.said()
    talk.nack(CLUSTER)
    talk.ack(ENDPOINT)
    talk.offer(world())
    assert talk.said() == [("cluster", (), ("bad",))]
