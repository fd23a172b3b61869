"""What gRPC's own client is given: only what it takes, and all that it needs."""

from pathlib import Path

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.route.v3.route_components_pb2 import Route
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from google.protobuf.json_format import ParseDict
from test_translate import CLIENT, GOLDEN, demo, mesh_of
from xds_server.generation import Generation
from xds_server.ingest import ingest
from xds_server.ir import Client, NodeId
from xds_server.sources.files import parse
from xds_server.translate import CLUSTER, ENDPOINT, LISTENER, ROUTE, proxyless, translate

GRPC = CLIENT._replace(client=Client.GRPC)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.name)
def test_whatever_the_mesh_the_snapshot_is_whole_and_sorted(file: Path) -> None:
    mesh, _ = ingest(parse(file.name, file.read_text())[0])
    snapshot = Generation(lambda node: translate(mesh, node)).snapshot(GRPC)
    for entries in snapshot.types.values():
        assert list(entries) == sorted(entries)
    for entry in snapshot.of(CLUSTER).values():
        message = Cluster.FromString(entry.body)
        assert message.type in (Cluster.EDS, Cluster.LOGICAL_DNS)
        assert message.lb_policy == Cluster.ROUND_ROBIN


def test_each_name_of_a_service_has_a_listener() -> None:
    resources = translate(mesh_of(demo()), GRPC)
    names = {name for name in resources[LISTENER] if name.startswith("web.demo")}
    assert names == {"web.demo:80", "web.demo.svc:80", "web.demo.svc.cluster.local:80"}
    assert "web:80" in resources[LISTENER]
    elsewhere = translate(mesh_of(demo()), GRPC._replace(namespace="other"))
    assert "web:80" not in elsewhere[LISTENER]
    # A sidecar of the same pod is given its own.
    assert set(translate(mesh_of(demo()), CLIENT)[LISTENER]) == {"inbound", "outbound"}
    assert resources[ENDPOINT].keys() == resources[CLUSTER].keys()
    assert "inbound" not in resources[ROUTE]


@pytest.mark.parametrize(
    ("agent", "client"),
    [
        ("", Client.ENVOY),
        ("envoy", Client.ENVOY),
        ("gRPC C-core linux", Client.GRPC),
        ("gRPC Go", Client.GRPC),
    ],
)
def test_client_is_known_by_its_user_agent(agent: str, client: Client) -> None:
    found = NodeId.parse("sidecar~10.0.0.1~web.demo~demo.svc.cluster.local", agent)
    assert found == NodeId("10.0.0.1", "web", "demo", client)


def followed(**envoy: object) -> list[Route]:
    table = ParseDict(
        {"virtualHosts": [{"name": "a", "domains": ["*"], "routes": [envoy]}]},
        RouteConfiguration(),
    )
    return list(proxyless.routes(table, 80).virtual_hosts[0].routes)


def test_prefix_of_whole_segments_becomes_two_routes() -> None:
    first, second = followed(match={"path_separated_prefix": "/a.B"}, route={"cluster": "c"})
    assert (first.match.path, second.match.prefix) == ("/a.B", "/a.B/")
    assert first.route.cluster == second.route.cluster == "c"


@pytest.mark.parametrize(
    ("match", "kept"),
    [
        ({"prefix": "/", "headers": [{"name": "x", "string_match": {"exact": "1"}}]}, 1),
        ({"prefix": "/", "headers": [{"name": ":method", "string_match": {"exact": "POST"}}]}, 0),
    ],
)
def test_headers_are_matched_and_every_call_is_a_post(match: object, kept: int) -> None:
    (route,) = followed(match=match, route={"cluster": "c"})
    assert len(route.match.headers) == kept


@pytest.mark.parametrize(
    "match",
    [
        {"prefix": "/", "headers": [{"name": ":method", "string_match": {"exact": "GET"}}]},
        {"prefix": "/", "query_parameters": [{"name": "a", "string_match": {"exact": "b"}}]},
    ],
)
def test_what_no_call_matches_is_left_out(match: object) -> None:
    assert followed(match=match, route={"cluster": "c"}) == []


def test_shares_are_drawn_one_by_one() -> None:
    """A quarter each, twice, and again for the next match."""

    def share(name: str, upto: int | None) -> dict[str, object]:
        fraction = {"default_value": {"numerator": upto, "denominator": "MILLION"}}
        match = {"prefix": "/"} | ({"runtime_fraction": fraction} if upto else {})
        return {"name": name, "match": match, "route": {"cluster": name}}

    shares = [250_000, 500_000, 750_000, None]
    routes = [share(f"a/b/0/{m}/{n}", upto) for m in (0, 1) for n, upto in enumerate(shares)]
    table = ParseDict(
        {"virtualHosts": [{"name": "a", "domains": ["*"], "routes": routes}]},
        RouteConfiguration(),
    )
    made = proxyless.routes(table, 80).virtual_hosts[0].routes
    fractions = [route.match.runtime_fraction.default_value.numerator for route in made]
    assert fractions == [250_000, 333_333, 500_000, 0] * 2


def test_timeouts_and_retries_are_told_in_its_words() -> None:
    (route,) = followed(
        match={"prefix": "/"},
        route={
            "cluster": "c",
            "timeout": "3s",
            "retry_policy": {"retry_on": "5xx,unavailable", "num_retries": 2},
        },
        typed_per_filter_config={"some.filter": {}},
    )
    assert route.route.max_stream_duration.max_stream_duration.seconds == 3
    assert route.route.retry_policy.retry_on == "unavailable"
    assert route.route.retry_policy.num_retries.value == 2
    assert not route.typed_per_filter_config
    (route,) = followed(
        match={"prefix": "/"},
        route={"cluster": "c", "timeout": "0s", "retry_policy": {"num_retries": 0}},
    )
    assert not route.route.HasField("retry_policy")
    assert not route.route.HasField("max_stream_duration")


def test_hosts_are_matched_with_the_port_too() -> None:
    table = ParseDict(
        {"virtualHosts": [{"name": "a", "domains": ["*.example.com", "b.example"]}]},
        RouteConfiguration(),
    )
    (host,) = proxyless.routes(table, 80).virtual_hosts
    assert list(host.domains) == ["*.example.com", "*.example.com:80", "b.example", "b.example:80"]


def test_a_locality_has_a_weight_and_stands_once() -> None:
    def group(zone: str, *ports: int, **more: object) -> dict[str, object]:
        addresses = ({"address": "10.0.0.1", "port_value": port} for port in ports)
        entries = [{"endpoint": {"address": {"socket_address": each}}} for each in addresses]
        return {"locality": {"zone": zone}, "lb_endpoints": entries, **more}

    envoy = ParseDict(
        {
            "cluster_name": "c",
            "endpoints": [
                group("a", 1, 2),
                group("b", 3, load_balancing_weight=7, priority=4),
                group("a", 4),
                group("empty"),
            ],
        },
        ClusterLoadAssignment(),
    )
    made = proxyless.endpoints(envoy)
    shape = [
        (e.locality.zone, e.priority, e.load_balancing_weight.value, len(e.lb_endpoints))
        for e in made.endpoints
    ]
    assert shape == [("a", 0, 3, 3), ("b", 1, 7, 1)]


@pytest.mark.parametrize(("number", "kind"), [(1, Cluster.LOGICAL_DNS), (2, Cluster.EDS)])
def test_a_name_to_resolve_is_taken_if_it_is_one(number: int, kind: int) -> None:
    envoy = Cluster(name="c", type=Cluster.STRICT_DNS)
    group = envoy.load_assignment.endpoints.add()
    for _ in range(number):
        group.lb_endpoints.add().endpoint.address.socket_address.address = "example.com"
    assert proxyless.cluster(envoy).type == kind


def test_an_external_name_is_one_to_resolve() -> None:
    (file,) = (path for path in GOLDEN if path.name == "services.in.yaml")
    mesh, _ = ingest(parse(file.name, file.read_text())[0])
    node = CLIENT._replace(client=Client.GRPC)
    found = translate(mesh, node)[CLUSTER]["outbound|8080|outside.demo"]
    assert isinstance(found, Cluster)
    assert found.type == Cluster.LOGICAL_DNS
    (place,) = found.load_assignment.endpoints[0].lb_endpoints
    assert place.endpoint.address.socket_address.address == "db.example.com"
