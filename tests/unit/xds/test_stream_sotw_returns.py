"""State-of-the-world clients that come back: they are sent what they lack, and no more."""

from test_stream_sotw import Talk, connected
from worlds import world
from xds_server.references import CLUSTER, ENDPOINT, ROUTE


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
