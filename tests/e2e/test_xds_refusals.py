"""What a real Envoy refuses is found and held back; everything else reaches it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import worlds
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from running import Sidecar
from scripted import Resources, Scripted
from waiting import eventually
from xds_server.references import CLUSTER, LISTENER, ROUTE, kind

from redirector.lab import Node

#: No extension of Envoy's.
UNKNOWN = AnyMessage(type_url="type.googleapis.com/google.protobuf.Duration")


def good(variant: int = 0) -> Resources:
    names = [f"c{number}" for number in range(20)]
    clusters = dict.fromkeys([*names, "web"], variant)
    return worlds.world(clusters=clusters, routes={"to-web": ("web", variant)})


def changed(resources: Resources, type_url: str, name: str, message: Message) -> Resources:
    return {**resources, type_url: {**resources[type_url], name: message}}


def invalid_cluster() -> Message:
    """Against the rules of its own fields: Envoy refuses the response and names nothing."""
    made: Cluster = worlds.cluster("c7")
    made.connect_timeout.FromNanoseconds(0)
    return made


def impossible_cluster() -> Message:
    """Each field is right, and Envoy lacks what it asks for."""
    made: Cluster = worlds.cluster("c7", 1)
    made.typed_extension_protocol_options["no.such.extension"].CopyFrom(UNKNOWN)
    return made


def bad_route() -> Message:
    made: RouteConfiguration = worlds.route("to-web", "web", 1)
    made.virtual_hosts[0].routes[0].match.safe_regex.regex = "("
    return made


def bad_listener() -> Message:
    made: Listener = worlds.listener("in", "to-web", 1)
    made.filter_chains[0].filters[0].typed_config.CopyFrom(UNKNOWN)
    return made


BAD = {
    "invalid cluster": (CLUSTER, "c7", invalid_cluster),
    "impossible cluster": (CLUSTER, "c7", impossible_cluster),
    "route": (ROUTE, "to-web", bad_route),
    "listener": (LISTENER, "in", bad_listener),
}


@pytest.fixture
def server(place: Path) -> Iterator[Scripted]:
    started = Scripted(place / "xds.sock", good())
    yield started
    started.stop()


@pytest.fixture(params=[{}, {"api_type": "GRPC"}], ids=["delta", "state of the world"])
def envoy(request: pytest.FixtureRequest, node: Node, place: Path, server: Scripted) -> Sidecar:  # noqa: ARG001
    xds = f"unix:{place / 'xds.sock'}"
    started = Sidecar(node.pod("client"), place, "client", "demo", xds, request.param)
    eventually("the listener", lambda: started.listeners() == ["in"])
    return started


def state(envoy: Sidecar) -> dict[tuple[str, str], str]:
    """What tells the variants of worlds.py apart, of each resource that is in use."""
    found = {}
    for entry in envoy.dump("ClustersConfigDump", "dynamic_active_clusters"):
        found["cluster", entry["cluster"]["name"]] = entry["cluster"]["connect_timeout"]
    for name, route in envoy.routes().items():
        found["route", name] = route["virtual_hosts"][0]["routes"][0]["route"]["timeout"]
    for entry in envoy.dump("ListenersConfigDump", "dynamic_listeners"):
        if "active_state" not in entry:
            # A refused one, told beside the one that is in use.
            continue
        (chain,) = entry["active_state"]["listener"]["filter_chains"]
        found["listener", entry["name"]] = chain["filters"][0]["typed_config"]["stat_prefix"]
    return found


def test_one_bad_resource_among_good_ones_stays_as_it_was_alone(
    server: Scripted, envoy: Sidecar
) -> None:
    before = eventually("all", lambda: state(envoy) if len(state(envoy)) == 23 else None)
    for label, (type_url, name, make) in BAD.items():
        variant = 1 + list(BAD).index(label)
        server.publish(good(variant))
        push = server.publish(changed(good(variant + 10), type_url, name, make()))
        assert push.waiting == 0
        (found,) = push.quarantined
        assert (found.type_url, found.name) == (type_url, name), label
        assert found.error
        # The others are new, it is the one before.
        new = {key: value for key, value in state(envoy).items() if key != (kind(type_url), name)}
        times = {key: f"{variant + 11}s" for key in new if key[0] != "listener"}
        assert {key: value for key, value in new.items() if key[0] != "listener"} == times, label
        assert state(envoy).keys() == before.keys()
        if type_url != LISTENER:
            assert state(envoy)[kind(type_url), name] == f"{variant + 1}s", label
        assert 1 <= len(push.nacks) <= 7, (label, push.nacks)

        # Repaired, it is taken.
        push = server.publish(good(variant))
        assert (push.nacks, push.waiting, push.quarantined) == ((), 0, ())
        assert set(state(envoy).values()) == {f"{variant + 1}s", "in0"}


def test_server_that_restarts_holds_nothing_up_for_what_was_refused(
    server: Scripted, envoy: Sidecar, place: Path
) -> None:
    eventually("all", lambda: len(state(envoy)) == 23)
    bad = invalid_cluster()
    refused = changed(good(1), CLUSTER, "c7", bad)
    assert [found.name for found in server.publish(refused).quarantined] == ["c7"]
    server.stop()
    other = Scripted(place / "xds.sock", refused)
    try:
        eventually("the sidecar", lambda: other.publish(refused).clients == 1)
        push = other.publish(changed(good(2), CLUSTER, "c7", bad))
        assert [(found.name, bool(found.error)) for found in push.quarantined] == [("c7", True)]
        has = state(envoy)
        assert has.pop(("cluster", "c7")) == "1s"
        assert set(has.values()) == {"3s", "in0"}
        assert len(push.nacks) <= 1
    finally:
        other.stop()
