"""Clients that are told of a removal in the middle of something else: nothing is left for ever."""

from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from test_stream_delta import connected
from worlds import Resources, world
from xds_server.references import CLUSTER, ENDPOINT, LISTENER


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
