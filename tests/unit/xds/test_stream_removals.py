"""Clients that are told of a removal in the middle of something else: nothing is left for ever."""

from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from test_stream_delta import Talk, connected
from worlds import Resources, listener, network_filter, world
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE


def bytes_to(cluster: str, prefix: str) -> Resources:
    """A listener that leads to a cluster without a route."""
    listener = Listener(name="in")
    filters = listener.filter_chains.add().filters
    proxy = TcpProxy(stat_prefix=prefix, cluster=cluster)
    filters.add(name="bytes").typed_config.Pack(proxy, deterministic=True)
    return {**world(routes={}, listeners={}), LISTENER: {"in": listener}}


def test_listener_that_went_before_its_change_was_answered_holds_no_cluster() -> None:
    talk = connected(bytes_to("web", "before"))
    talk.offer(bytes_to("web", "after"))
    assert talk.said() == [("listener", ("in",), ())]
    changed = talk.last[LISTENER].nonce
    talk.offer(world(clusters={}, routes={}, listeners={}))
    assert talk.said() == [("listener", (), ("in",))]
    talk.ack(LISTENER, changed)
    assert talk.said() == []
    talk.ack(LISTENER)
    assert talk.said() == [("cluster", (), ("web",))]
    talk.ack(CLUSTER)
    assert talk.said() == [("endpoints", (), ("web",))]
    talk.ack(ENDPOINT)
    assert talk.said() == []
    assert talk.stream.settled


def filtered(cluster: str, name: str, variant: int = 0) -> Resources:
    """A listener with a filter that comes on its own."""
    made = world(clusters={cluster: 0}, routes={cluster: (cluster, 0)})
    return {
        **made,
        LISTENER: {"in": listener("in", cluster, filter_name=name)},
        FILTER: {name: network_filter(name, variant)},
    }


def succeeded() -> Talk:
    """A client that has a listener with its filter, and was sent one that is to take over."""
    talk = connected(filtered("old", "before"))
    talk.ask(FILTER, ["before"])
    talk.said()
    talk.ack(FILTER)
    talk.offer(filtered("web", "after"))
    talk.said()
    talk.ask(ROUTE, ["web"])
    return talk


def test_what_a_listener_leads_to_stays_while_its_successors_filter_is_refused() -> None:
    talk = succeeded()
    talk.ask(FILTER, ["after"])
    talk.said()
    for type_url in (CLUSTER, ENDPOINT, LISTENER, ROUTE):
        talk.ack(type_url)
    talk.nack(FILTER)
    # The new listener warms for ever; the one before has its filter, its route and its cluster.
    assert talk.said() == []
    assert talk.stream.settled
    talk.offer(filtered("web", "after", variant=1))
    assert talk.said() == [("filter", ("after",), ())]
    talk.ack(FILTER)
    talk.ask(ROUTE, unsubscribe=["old"])
    talk.ask(FILTER, unsubscribe=["before"])
    assert talk.said() == [("cluster", (), ("old",))]


def test_nothing_goes_before_the_client_asked_for_the_listeners_new_filter() -> None:
    talk = succeeded()
    talk.said()
    for type_url in (CLUSTER, ENDPOINT, LISTENER, ROUTE):
        talk.ack(type_url)
    assert talk.said() == []
    assert not talk.stream.settled
