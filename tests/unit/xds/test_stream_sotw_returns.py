"""State-of-the-world clients that come back: they are sent what they lack, and no more."""

from test_stream_sotw import Talk, connected
from worlds import world
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE


def test_who_takes_part_in_a_removal_that_is_called_off_comes_back_to_nothing() -> None:
    one = world(clusters={"web": 0}, routes={}, listeners={})
    both = world(clusters={"web": 0, "new": 0}, routes={}, listeners={})
    talk = connected(one)
    talk.offer(world(clusters={"new": 0}, routes={}, listeners={}))
    assert talk.said() == [("cluster", ("new", "web")), ("endpoints", ("new",))]
    talk.ask(ENDPOINT, ["new", "web"])
    assert talk.said() == [("endpoints", ("new",))]
    talk.ack(ENDPOINT)
    talk.offer(both)
    talk.said()
    talk.ack()
    assert talk.said() == []
    again = Talk(both)
    for type_url, names in ((CLUSTER, []), (ENDPOINT, ["new", "web"])):
        again.ask(type_url, names, version=talk.last[type_url].version)
    assert [names for _, names in again.said()] == [()]


def test_name_let_go_of_and_taken_up_again_before_the_first_answer_is_sent() -> None:
    had = connected().last[ROUTE].version
    talk = Talk(world())
    for names in (["to-web"], [], ["to-web"]):
        talk.ask(ROUTE, names, version=had)
    assert talk.said() == [("route", ("to-web",))]


def test_who_is_cut_off_as_a_cluster_comes_again_has_its_endpoints_sent() -> None:
    """It let go of their name in between, and nobody heard."""
    bare = world(routes={}, listeners={})
    talk = connected(bare)
    had = talk.last[ENDPOINT].version
    talk.offer(world(clusters={}, routes={}, listeners={}))
    assert talk.said() == [("cluster", ())]
    talk.offer(bare)
    told = talk.stream.next_response()
    assert told is not None
    assert (told.type_url, told.resources) == (ENDPOINT, ())
    assert told.version != had
    assert talk.said() == [("cluster", ("web",)), ("endpoints", ("web",))]
    assert talk.last[ENDPOINT].version == had
    # All but the last of these came.
    again = Talk(bare)
    again.ask(ENDPOINT, ["web"], version=told.version)
    again.ask(CLUSTER, version=talk.last[CLUSTER].version)
    assert ("endpoints", ("web",)) in again.said()


def test_who_is_cut_off_as_a_listener_comes_again_has_its_route_sent() -> None:
    without = world(listeners={})
    talk = connected()
    had = talk.last[ROUTE].version
    talk.offer(without)
    assert talk.said() == [("listener", ())]
    talk.offer(world())
    assert talk.said() == [("route", ()), ("listener", ("in",)), ("route", ("to-web",))]
    assert talk.last[ROUTE].version == had


def test_who_is_heard_to_let_go_of_a_name_is_told_of_it_once() -> None:
    talk = connected()
    talk.offer(world(listeners={}))
    assert talk.said() == [("listener", ())]
    talk.ask(ROUTE)
    assert talk.said() == [("route", ())]
    talk.ack()
    talk.offer(world())
    assert talk.said() == [("listener", ("in",))]
    talk.ack(LISTENER)
    talk.ask(ROUTE, ["to-web"])
    assert talk.said() == [("route", ("to-web",))]
    talk.ack()
    assert talk.said() == []
    assert talk.stream.level
