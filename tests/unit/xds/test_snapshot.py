"""Snapshots: versions by content, one encoding for all, references that lead somewhere."""

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from google.protobuf.message import Message
from worlds import Resources, cluster, endpoints, listener, route, world
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE, Reference, references
from xds_server.snapshot import Encoder, Snapshot


def snapshot(resources: Resources) -> Snapshot:
    return Encoder().snapshot(resources)


def test_version_is_the_contents_and_nothing_else() -> None:
    one, other = Encoder().snapshot(world()), Encoder().snapshot(world())
    changed = Encoder().snapshot(world(clusters={"web": 1}))
    assert one.of(CLUSTER).version == other.of(CLUSTER).version
    assert one.of(CLUSTER)["web"].version == other.of(CLUSTER)["web"].version
    assert changed.of(CLUSTER)["web"].version != one.of(CLUSTER)["web"].version
    assert changed.of(CLUSTER).version != one.of(CLUSTER).version
    assert changed.of(ROUTE).version == one.of(ROUTE).version


def test_version_of_a_set_does_not_hang_on_its_order() -> None:
    forth = snapshot({CLUSTER: {"a": cluster("a"), "b": cluster("b")}})
    back = snapshot({CLUSTER: {"b": cluster("b"), "a": cluster("a")}})
    assert forth.of(CLUSTER).version == back.of(CLUSTER).version


def test_maps_inside_a_message_do_not_change_its_version() -> None:
    one, other = cluster("a"), cluster("a")
    for name in ("x", "y"):
        one.metadata.filter_metadata[name].fields["k"].string_value = "v"
    for name in ("y", "x"):
        other.metadata.filter_metadata[name].fields["k"].string_value = "v"
    assert (
        snapshot({CLUSTER: {"a": one}}).of(CLUSTER).version
        == snapshot({CLUSTER: {"a": other}}).of(CLUSTER).version
    )


def test_nothing_is_encoded_twice_for_a_thousand_sidecars() -> None:
    shared = world(clusters={f"c{n}": 0 for n in range(20)}, routes={}, listeners={})
    encoder = Encoder()
    snapshots = [
        # As translate() does it: the same messages, here in mappings of the node's own.
        encoder.snapshot({**shared, CLUSTER: dict(shared[CLUSTER]), LISTENER: {}, ROUTE: {}})
        for _ in range(1000)
    ]
    assert encoder.encodings == 40
    assert len({id(each.of(CLUSTER)) for each in snapshots}) == 1


def test_equal_content_from_different_messages_is_one_set() -> None:
    encoder = Encoder()
    one, other = encoder.snapshot(world()), encoder.snapshot(world())
    for type_url in (CLUSTER, ENDPOINT, LISTENER, ROUTE):
        assert one.of(type_url) is other.of(type_url)


def test_message_under_two_names_is_two_resources() -> None:
    message = endpoints("a")
    entries = snapshot({ENDPOINT: {"a": message, "b": message}}).of(ENDPOINT)
    assert [entry.name for entry in entries.values()] == ["a", "b"]


def test_changed_since_names_added_removed_and_changed() -> None:
    old = snapshot(world(clusters={"gone": 0, "kept": 0, "web": 0})).of(CLUSTER)
    new = snapshot(world(clusters={"kept": 0, "new": 0, "web": 1})).of(CLUSTER)
    assert new.changed_since(old) == {"gone", "new", "web"}
    assert new.changed_since(old) is new.changed_since(old)
    assert new.changed_since(new) == frozenset()


def test_snapshot_cannot_be_changed_through_what_it_was_made_of() -> None:
    clusters: dict[str, Message] = {"web": cluster("web")}
    made = snapshot({CLUSTER: clusters})
    clusters["late"] = cluster("late")
    assert list(made.of(CLUSTER)) == ["web"]


def test_type_that_is_not_served_is_empty() -> None:
    assert dict(snapshot({}).of("type.googleapis.com/unknown")) == {}


def test_consistent_world_has_nothing_to_say() -> None:
    assert Encoder().snapshot(world()).consistent() == ()


def test_every_dangling_reference_is_named() -> None:
    made = snapshot(
        {
            CLUSTER: {"web": cluster("web")},
            ENDPOINT: {},
            LISTENER: {"in": listener("in", "nowhere")},
            ROUTE: {"r": route("r", "away")},
        }
    )
    assert made.consistent() == (
        "cluster 'web' names endpoints 'web', which is not there",
        "listener 'in' names route 'nowhere', which is not there",
        "route 'r' names cluster 'away', which is not there",
    )


def test_references_follow_service_names_weights_and_the_default_chain() -> None:
    named = cluster("web")
    named.eds_cluster_config.service_name = "other"
    assert references(named) == {Reference(ENDPOINT, "other")}
    fixed = Cluster(name="fixed", type=Cluster.STATIC)
    assert references(fixed) == frozenset()

    split = route("r", "a")
    action = split.virtual_hosts[0].routes.add().route
    for target in ("b", "c"):
        action.weighted_clusters.clusters.add(name=target)
    assert references(split) == {Reference(CLUSTER, name) for name in "abc"}

    made = listener("in", "r")
    made.default_filter_chain.CopyFrom(listener("in", "fallback").filter_chains[0])
    assert references(made) == {Reference(ROUTE, "r"), Reference(ROUTE, "fallback")}
