"""Whose refusals objects' statuses tell of."""

from ipaddress import ip_address

import pytest
from test_stream_delta import Talk, connected
from worlds import world
from xds_server.identity import Peer
from xds_server.ir import Client, Name, NodeId, Workload
from xds_server.references import CLUSTER, ENDPOINT
from xds_server.stream import Stream
from xds_server.witnesses import Trust, Witness, credible, trust

NODE = NodeId("10.0.0.1", "web-1", "demo")
OTHER = NodeId("10.0.0.2", "api-1", "demo")
WEB = Name("demo", "web-1")
PODS = {WEB: Workload(WEB, (ip_address("10.0.0.1"), ip_address("fd00::1")))}
CHANGED = world(clusters={"web": 1})


@pytest.mark.parametrize(
    ("node", "peer", "address", "found"),
    [
        (NODE, Peer(), "ipv4:10.0.0.9:4711", Trust.PROVEN),
        (NODE, None, "ipv4:10.0.0.1:4711", Trust.PROVEN),
        (NODE, None, "ipv6:%5Bfd00::1%5D:4711", Trust.PROVEN),
        (NODE, None, "ipv6:[::ffff:10.0.0.1]:4711", Trust.PROVEN),
        (NODE, None, "ipv4:10.0.0.2:4711", Trust.NONE),
        (NODE, None, "ipv6:%5Bfe80::1%25eth0%5D:4711", Trust.NONE),
        (OTHER, None, "ipv4:10.0.0.2:4711", Trust.NONE),
        (NODE, None, "unix:", Trust.WORD),
        (OTHER, None, "ipv4:127.0.0.1:4711", Trust.WORD),
        (NODE, None, "ipv6:%5B::1%5D:4711", Trust.WORD),
    ],
)
def test_who_is_known_to_be_its_pod(
    node: NodeId, peer: Peer | None, address: str, found: Trust
) -> None:
    assert trust(PODS, node, peer, address) is found


def changed() -> Talk:
    talk = connected()
    talk.offer(CHANGED)
    talk.said()
    return talk


def refusing() -> Stream:
    talk = changed()
    talk.nack(CLUSTER)
    talk.ack(ENDPOINT)
    assert talk.said() == []
    return talk.stream


def taking() -> Stream:
    talk = changed()
    talk.ack(CLUSTER)
    talk.ack(ENDPOINT)
    assert talk.said() == []
    return talk.stream


def waiting() -> Stream:
    return changed().stream


@pytest.mark.parametrize(
    ("others", "believed"),
    [
        ([], True),
        # A second stream of one sidecar, which is restarted or has not answered yet.
        ([Witness(NODE, Trust.WORD, waiting())], True),
        ([Witness(NODE, Trust.WORD, refusing())], True),
        # Two that say to be one pod, and only one of them may be.
        ([Witness(NODE, Trust.WORD, taking())], False),
        ([Witness(NODE, Trust.PROVEN, waiting())], False),
        ([Witness(NODE, Trust.NONE, taking())], True),
        # Another pod's, and the gRPC program beside the sidecar, are other programs.
        ([Witness(OTHER, Trust.PROVEN, taking())], True),
        ([Witness(NODE._replace(client=Client.GRPC), Trust.PROVEN, taking())], True),
    ],
)
def test_a_pods_word_is_that_of_who_is_known_best_and_is_not_contradicted(
    others: list[Witness], believed: bool
) -> None:
    found = set(credible([Witness(NODE, Trust.WORD, refusing()), *others]))
    assert {(node, what.name) for node, what in found} == ({(NODE, "web")} if believed else set())


def test_who_comes_from_elsewhere_than_its_pod_is_not_believed() -> None:
    assert list(credible([Witness(NODE, Trust.NONE, refusing())])) == []


def test_a_certificates_word_stands_against_all_others() -> None:
    (found,) = credible(
        [
            Witness(NODE, Trust.PROVEN, refusing()),
            Witness(NODE, Trust.WORD, taking()),
            Witness(NODE, Trust.NONE, taking()),
        ]
    )
    assert found[0] == NODE
