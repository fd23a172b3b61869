"""What becomes of routes: their conditions, and which requests are whose."""

import pytest
import yaml
from xds_server.conditions import ObjectStatus
from xds_server.ingest import Ingester, ingest
from xds_server.ir import Mesh, Name, Parent, Protocol
from xds_server.sources.objects import KubeObject

ACCEPTED = {"Accepted": "Accepted", "ResolvedRefs": "ResolvedRefs"}


def service(name: str, ports: dict[str, int], namespace: str = "demo", **spec: str) -> KubeObject:
    """`ports` are names with their numbers."""
    listed = [{"name": port, "port": number} for port, number in ports.items()]
    return KubeObject(
        "s.yaml",
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"ports": listed, **spec},
        },
    )


SERVICES = [
    service("web", {"http": 80, "alt": 8080, "tcp-db": 5432}, clusterIP="10.96.0.1"),
    service("headless", {"http": 80}, clusterIP="None"),
    service("outside", {}, type="ExternalName", externalName="a.example.com"),
    service("db", {"tcp": 1}, clusterIP="10.96.0.2"),
    service("api", {"http": 80}, "far", clusterIP="10.96.0.3"),
]


def route(
    parents: str,
    rules: str = "[{backendRefs: [{name: web, port: 80}]}]",
    kind: str = "HTTPRoute",
    name: str = "route",
    namespace: str = "demo",
) -> KubeObject:
    """`parents` are parentRefs of Services."""
    references = [{"group": "", "kind": "Service", **each} for each in yaml.safe_load(parents)]
    return KubeObject(
        "r.yaml",
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": kind,
            "metadata": {"name": name, "namespace": namespace, "generation": 3},
            "spec": {"parentRefs": references, "rules": yaml.safe_load(rules)},
        },
    )


def grant(kind: str, namespace: str = "demo", to: str = "{kind: Service}") -> KubeObject:
    spec = {
        "from": [{"group": "gateway.networking.k8s.io", "kind": kind, "namespace": namespace}],
        "to": [{"group": "", **yaml.safe_load(to)}],
    }
    data = {
        "apiVersion": "gateway.networking.k8s.io/v1beta1",
        "kind": "ReferenceGrant",
        "metadata": {"name": "grant", "namespace": "far"},
        "spec": spec,
    }
    return KubeObject("g.yaml", data)


def mesh_of(*objects: KubeObject) -> Mesh:
    return ingest([*SERVICES, *objects])[0]


def reasons(status: ObjectStatus) -> list[dict[str, str]]:
    """For each parent, the reasons by type."""
    return [{one.type: one.reason for one in parent.conditions} for parent in status.parents]


def of(mesh: Mesh, kind: str = "HTTPRoute") -> ObjectStatus:
    (status,) = (one for one in mesh.statuses if one.kind == kind)
    return status


@pytest.mark.parametrize(
    ("parent", "ports"),
    [
        ("{name: web}", [80, 8080]),
        ("{name: web, port: 8080}", [8080]),
        ("{name: web, sectionName: alt}", [8080]),
        ("{name: web, sectionName: alt, port: 8080}", [8080]),
        ("{name: web, namespace: demo, port: 80}", [80]),
        ("{name: web, sectionName: alt, port: 80}", []),
        ("{name: web, sectionName: main}", []),
        ("{name: web, port: 81}", []),
        ("{name: web, port: 5432}", []),
        ("{name: db}", []),
        ("{name: headless}", []),
        ("{name: outside}", []),
        ("{name: nobody}", []),
        ("{name: web, namespace: far}", []),
    ],
)
def test_parents(parent: str, ports: list[int]) -> None:
    mesh = mesh_of(route(f"[{parent}]"))
    (made,) = mesh.routes
    assert made.parents == tuple(Parent(Name("demo", "web"), port) for port in ports)
    accepted = "Accepted" if ports else "NoMatchingParent"
    assert reasons(of(mesh)) == [{"Accepted": accepted, "ResolvedRefs": "ResolvedRefs"}]
    assert of(mesh).generation == 3


@pytest.mark.parametrize(
    ("parents", "hostnames"),
    [
        ("[{name: web}]", ("web.example.com",)),
        # They are the Gateway's: clients in the mesh ask by the Service's name.
        ("[{name: web}, {group: gateway.networking.k8s.io, kind: Gateway, name: edge}]", ()),
    ],
)
def test_hostnames(parents: str, hostnames: tuple[str, ...]) -> None:
    given = route(parents)
    spec = given.data["spec"]
    assert isinstance(spec, dict)
    spec["hostnames"] = ["web.example.com"]
    assert mesh_of(given).routes[0].hostnames == hostnames


def test_each_parent_has_its_own_conditions() -> None:
    mesh = mesh_of(route("[{name: web}, {name: nobody}, {name: web, port: 80}]"))
    assert [found["Accepted"] for found in reasons(of(mesh))] == [
        "Accepted",
        "NoMatchingParent",
        "Accepted",
    ]
    assert [parent.parent.port for parent in of(mesh).parents] == [None, None, 80]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("{name: web, port: 80}", "ResolvedRefs"),
        ("{name: headless, port: 80}", "ResolvedRefs"),
        ("{name: outside, port: 443}", "ResolvedRefs"),
        ("{name: web, port: 81}", "BackendNotFound"),
        ("{name: web, port: 5432}", "UnsupportedProtocol"),
        ("{name: nobody, port: 80}", "BackendNotFound"),
        ("{name: web, port: 80, kind: Job}", "InvalidKind"),
        ("{name: web, port: 80, group: example.com}", "InvalidKind"),
        ("{name: api, namespace: far, port: 80}", "RefNotPermitted"),
        # Whether it exists is not for this namespace to know.
        ("{name: nobody, namespace: far, port: 80}", "RefNotPermitted"),
    ],
)
@pytest.mark.parametrize("kind", ["HTTPRoute", "GRPCRoute"])
def test_backends(kind: str, backend: str, reason: str) -> None:
    mesh = mesh_of(route("[{name: web}]", f"[{{backendRefs: [{backend}]}}]", kind))
    assert reasons(of(mesh, kind)) == [{"Accepted": "Accepted", "ResolvedRefs": reason}]
    (rule,) = mesh.routes[0].rules
    assert rule.backends[0].found == (reason == "ResolvedRefs")


@pytest.mark.parametrize(
    ("granted", "reason"),
    [
        (grant("HTTPRoute"), "ResolvedRefs"),
        (grant("HTTPRoute", to="{kind: Service, name: api}"), "ResolvedRefs"),
        (grant("HTTPRoute", to="{kind: Service, name: other}"), "RefNotPermitted"),
        (grant("HTTPRoute", to="{kind: Secret}"), "RefNotPermitted"),
        (grant("HTTPRoute", namespace="elsewhere"), "RefNotPermitted"),
        (grant("GRPCRoute"), "RefNotPermitted"),
    ],
)
def test_grants(granted: KubeObject, reason: str) -> None:
    rules = "[{backendRefs: [{name: api, namespace: far, port: 80}]}]"
    mesh = mesh_of(route("[{name: web}]", rules), granted)
    assert reasons(of(mesh))[0]["ResolvedRefs"] == reason


@pytest.mark.parametrize(
    ("parents", "reason"),
    [
        ("[{name: api, namespace: far}]", "ResolvedRefs"),
        ("[{name: api, namespace: far}, {name: other, namespace: far}]", "ResolvedRefs"),
        ("[{name: other, namespace: far}]", "RefNotPermitted"),
        # It would bring clients of all namespaces there.
        ("[{name: api, namespace: far}, {name: web}]", "RefNotPermitted"),
    ],
)
def test_a_consumers_route_needs_no_grant_for_its_parents(parents: str, reason: str) -> None:
    mesh = mesh_of(route(parents, "[{backendRefs: [{name: api, namespace: far, port: 80}]}]"))
    assert {found["ResolvedRefs"] for found in reasons(of(mesh))} == {reason}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("", {**ACCEPTED}),
        ("[{sessionPersistence: {}}]", {**ACCEPTED}),
        ("[{name: a}, {name: a}]", {**ACCEPTED}),
        ("[{filters: [{type: Nope}]}, {}]", {**ACCEPTED, "PartiallyInvalid": "UnsupportedValue"}),
        ("[{filters: [{type: Nope}]}]", {**ACCEPTED, "Accepted": "UnsupportedValue"}),
        ("[{matches: [{method: get}]}]", {**ACCEPTED, "Accepted": "UnsupportedValue"}),
        (
            "[{filters: [{type: URLRewrite, urlRewrite: {}}, "
            "{type: RequestRedirect, requestRedirect: {}}]}]",
            {**ACCEPTED, "Accepted": "IncompatibleFilters"},
        ),
        (
            "[{filters: [{type: RequestRedirect, requestRedirect: {}}], "
            "backendRefs: [{name: web, port: 80}]}]",
            {**ACCEPTED, "Accepted": "UnsupportedValue"},
        ),
        (
            "[{matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, "
            "urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}]",
            {**ACCEPTED, "Accepted": "UnsupportedValue"},
        ),
    ],
)
def test_rules(rules: str, expected: dict[str, str]) -> None:
    mesh, problems = ingest([*SERVICES, route("[{name: web, port: 80}]", rules)])
    assert reasons(of(mesh)) == [expected]
    assert problems
    assert bool(mesh.routes) == (expected["Accepted"] == "Accepted")


def test_what_of_a_broken_rule_is_told() -> None:
    mesh = mesh_of(route("[{name: web}]", "[{}, {timeouts: {request: soon}}]"))
    (told,) = (c for c in of(mesh).parents[0].conditions if c.type == "PartiallyInvalid")
    assert told.status
    # The specification asks for this beginning.
    assert told.message.startswith("Dropped Rule: spec.rules[1].timeouts.request")
    assert [rule.broken for rule in mesh.routes[0].rules] == [False, True]


def test_the_last_good_form_stays_and_the_status_says_what_is_wrong() -> None:
    ingester = Ingester()
    good, bad = route("[{name: web}]"), route("[{name: web}]", "[{matches: [{method: get}]}]")
    before, _ = ingester.ingest([*SERVICES, good])
    after, _ = ingester.ingest([*SERVICES, bad])
    assert after.routes == before.routes
    (accepted, _) = of(after).parents[0].conditions
    assert not accepted.status
    assert accepted.message.startswith("spec.rules[0].matches[0].method: 'get': must be one of")
    assert accepted.message.endswith("; its last good form stays in force")


def test_a_good_route_of_which_one_rule_becomes_bad_falls_back() -> None:
    """Requests that were served go on being served."""
    ingester = Ingester()
    good, bad = route("[{name: web}]"), route("[{name: web}]", "[{}, {retry: {attempts: -1}}]")
    before, _ = ingester.ingest([*SERVICES, good])
    bad.data["metadata"]["generation"] = 4  # type: ignore[index]
    after, _ = ingester.ingest([*SERVICES, bad])
    assert after.routes == before.routes
    assert reasons(of(after)) == [{**ACCEPTED, "PartiallyInvalid": "UnsupportedValue"}]
    told = of(after).parents[0].conditions[-1].message
    # The specification asks for this beginning, and for the generation that is accepted.
    assert told.startswith("Fall Back: spec.rules[1].retry.attempts: -1: must be from 0 to 100")
    assert of(after).generation == 3
    # Without anything to fall back to, what is good of it is served.
    alone = mesh_of(bad)
    assert [rule.broken for rule in alone.routes[0].rules] == [False, True]
    assert alone.left_out == ()


@pytest.mark.parametrize(
    ("http", "grpc", "conflict"),
    [
        ("{name: web, port: 80}", "{name: web, port: 80}", True),
        ("{name: web, port: 80}", "{name: web, port: 8080}", False),
        ("{name: web, port: 80}", "{name: web}", True),
    ],
)
def test_grpc_routes_go_first(http: str, grpc: str, conflict: bool) -> None:
    mesh = mesh_of(route(f"[{http}]"), route(f"[{grpc}]", kind="GRPCRoute"))
    assert reasons(of(mesh, "GRPCRoute"))[0]["Accepted"] == "Accepted"
    assert reasons(of(mesh))[0]["Accepted"] == ("Conflicted" if conflict else "Accepted")
    (made,) = (one for one in mesh.routes if one.kind.value == "HTTPRoute")
    assert bool(made.parents) == (not conflict)


def test_a_consumers_grpc_route_leaves_the_producers_http_route() -> None:
    """They are for different clients."""
    far = "{name: web, namespace: demo, port: 80}"
    mesh = mesh_of(
        route("[{name: web, port: 80}]"),
        route(f"[{far}]", "[]", kind="GRPCRoute", namespace="far"),
        route(f"[{far}]", "[{}]", name="other", namespace="far"),
    )
    accepted = {one.subject: reasons(one)[0]["Accepted"] for one in mesh.statuses}
    assert accepted == {
        "HTTPRoute demo/route": "Accepted",
        "GRPCRoute far/route": "Accepted",
        "HTTPRoute far/other": "Conflicted",
    }


def test_what_routes_say_of_protocols() -> None:
    """Ports that say nothing of their own; those that do are believed."""
    mirror = "{type: RequestMirror, requestMirror: {backendRef: {name: back, port: 2}}}"
    references = "[{name: back, port: 1}, {name: back, port: 3}]"
    mesh, problems = ingest(
        [
            service("front", {"a": 1, "b": 2}, clusterIP="10.96.1.1"),
            service("back", {"a": 1, "b": 2, "http-c": 3}, clusterIP="10.96.1.2"),
            route(
                "[{name: front, port: 1}]",
                f"[{{filters: [{mirror}], backendRefs: {references}}}]",
                kind="GRPCRoute",
            ),
            route("[{name: front, port: 2}]", "[{backendRefs: [{name: front, port: 2}]}]"),
        ]
    )
    assert problems == []
    found = {
        (each.name.name, port.number): port.protocol
        for each in mesh.services.values()
        for port in each.ports
    }
    assert found == {
        ("front", 1): Protocol.HTTP2,
        ("front", 2): Protocol.HTTP,
        ("back", 1): Protocol.HTTP2,
        ("back", 2): Protocol.HTTP2,
        ("back", 3): Protocol.HTTP,
    }
