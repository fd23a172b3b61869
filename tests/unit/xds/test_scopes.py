"""What a sidecar is told of, and what its application reaches."""

from typing import Any

import pytest
from envoy_static import as_json
from test_ingest import ROUTE, SERVICE, SLICE
from xds_server.errors import Problem
from xds_server.ingest import Ingester
from xds_server.ingest.scopes import NOTHING, Wishes, parse_imports
from xds_server.ir import Mesh, Name, NodeId, Scope
from xds_server.lineage import Lineage
from xds_server.sources.files import parse
from xds_server.translate import CLUSTER, ENDPOINT, LISTENER, Translator
from xds_server.translate import ROUTE as ROUTES

POD = """
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s, annotations: {%s}}
spec: {}
status: {podIP: %s}
"""
NAMESPACE = """
apiVersion: v1
kind: Namespace
metadata: {name: %s, annotations: {%s}}
"""
FAR = SERVICE.replace("demo", "far").replace("10.96.77.1", "10.96.77.2")


def read(*texts: str, defaults: Wishes = NOTHING) -> tuple[Mesh, list[Problem]]:
    objects, problems = parse("f.yaml", "\n---\n".join(texts))
    assert problems == []
    return Ingester(defaults).ingest(objects)


def node(name: str, namespace: str) -> NodeId:
    return NodeId("10.77.0.1", name, namespace)


def told(mesh: Mesh, who: NodeId) -> dict[str, set[str]]:
    """What the sidecar is told of by type: clusters with endpoints, the outbound listener's chains
    and the routes."""
    resources = Translator(mesh).resources(who)
    listener: Any = resources[LISTENER]["outbound"]
    assert {name for name in resources[CLUSTER] if "|" in name} == set(resources[ENDPOINT])
    return {
        "clusters": set(resources[ENDPOINT]),
        "chains": {chain.name for chain in listener.filter_chains if "blackhole" not in chain.name},
        "routes": {name for name in resources[ROUTES] if not name.startswith("inbound")},
        "rest": {listener.default_filter_chain.name},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*", Scope(everything=True)),
        ("a, *", Scope(everything=True)),
        (".", Scope()),
        ("a,b/*, c/d ,.", Scope(frozenset({"a", "b"}), frozenset({Name("c", "d")}))),
        ("", ""),
        ("a,,b", ""),
        ("A", "A"),
        ("*/a", "*/a"),
        ("a/b/c", "a/b/c"),
        ("a b", "a b"),
        ("a," * 5000, "more than 1000 entries"),
    ],
)
def test_imports(text: str, expected: Scope | str) -> None:
    assert parse_imports(text) == expected


WEB, FAR_WEB = "outbound|80|web.demo", "outbound|80|web.far"


@pytest.mark.parametrize(
    ("default", "namespace", "pod", "expected"),
    [
        (None, "", "", {WEB, FAR_WEB}),
        (".", "", "", {WEB}),
        (".", "redirector.io/imports: far", "", {WEB, FAR_WEB}),
        (".", "redirector.io/imports: far/web", "", {WEB, FAR_WEB}),
        (".", "redirector.io/imports: far/other", "", {WEB}),
        (".", "redirector.io/imports: far", "redirector.io/imports: .", {WEB}),
        ("far", "redirector.io/imports: .", "redirector.io/imports: '*'", {WEB, FAR_WEB}),
        # A mistake is as if nothing had been said.
        (".", "", "redirector.io/imports: F", {WEB}),
        (".", "", "redirector.io/imports: 3", {WEB}),
    ],
)
def test_who_is_told_of_what(
    default: str | None, namespace: str, pod: str, expected: set[str]
) -> None:
    scope = parse_imports(default) if default else None
    assert not isinstance(scope, str)
    mesh, _ = read(
        NAMESPACE % ("demo", namespace),
        POD % ("client", "demo", pod, "10.77.0.1"),
        SERVICE,
        FAR,
        defaults=Wishes(scope),
    )
    seen = told(mesh, node("client", "demo"))
    assert seen["clusters"] == seen["chains"] == seen["routes"] == expected


def test_a_route_brings_what_it_leads_to() -> None:
    route = ROUTE.replace("backendRefs: [{name: web", "backendRefs: [{name: web, namespace: far")
    grant = """
apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: demo, namespace: far}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: demo}]
  to: [{group: "", kind: Service}]
"""
    texts = [POD % ("client", "demo", "redirector.io/imports: .", "10.77.0.1"), SERVICE, FAR, grant]
    mesh, problems = read(*texts, route)
    assert problems == []
    seen = told(mesh, node("client", "demo"))
    assert (seen["clusters"], seen["chains"]) == ({WEB, FAR_WEB}, {WEB})
    # A route that is for other clients brings nothing.
    consumer = route.replace("name: web, namespace: demo}", "name: web, namespace: far}").replace(
        "Service, name: web", "Service, name: web, namespace: demo"
    )
    mesh, problems = read(*texts, consumer)
    assert problems == []
    assert told(mesh, node("client", "demo"))["clusters"] == {WEB}
    # Who has a route for a Service elsewhere is told of the Service.
    guest = POD % ("guest", "far", "redirector.io/imports: .", "10.77.0.2")
    seen = told(read(*texts, guest, consumer)[0], node("guest", "far"))
    assert seen["clusters"] == seen["chains"] == seen["routes"] == {WEB, FAR_WEB}


@pytest.mark.parametrize(
    ("kind", "spoken"), [("HTTPRoute", set()), ("GRPCRoute", {WEB, "outbound|80|web.shop"})]
)
def test_what_a_route_says_of_others_ports_is_for_its_own_clients(
    kind: str, spoken: set[str]
) -> None:
    """A port of bytes (a database's) is not taken away from everybody else."""
    undeclared = SERVICE.replace("name: http, port", "name: sql, port")
    route = f"""
apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: web, namespace: shop}}
spec:
  parentRefs: [{{group: "", kind: Service, name: web, namespace: demo}}]
  rules: [{{backendRefs: [{{name: web, port: 80}}]}}]
"""
    mesh, problems = read(
        POD % ("web-v1", "demo", "", "10.77.0.1"),
        POD % ("guest", "shop", "", "10.77.0.2"),
        undeclared,
        SLICE.replace("name: http", "name: sql"),
        FAR.replace("far", "shop").replace("name: http, port", "name: sql, port"),
        route,
    )
    assert problems == []
    home, guest = told(mesh, node("web-v1", "demo")), told(mesh, node("guest", "shop"))
    # Its own Service's port, for which it speaks, is HTTP/2 to all.
    own = {"outbound|80|web.shop"} & spoken
    assert (home["routes"], guest["routes"]) == (own, {WEB} | own)
    inbound: Any = Translator(mesh).resources(node("web-v1", "demo"))[LISTENER]["inbound"]
    assert [chain.name for chain in inbound.filter_chains if "inbound" in chain.name] == []
    clusters = Translator(mesh).resources(node("guest", "shop"))[CLUSTER]
    http2 = {
        name
        for name, cluster in clusters.items()
        if "|" in name and "explicit_http_config" in as_json(cluster)
    }
    assert http2 == spoken


def test_sidecars_of_one_scope_share_and_a_change_elsewhere_concerns_nobody() -> None:
    def pods(name: str, namespace: str, ip: str) -> str:
        return POD % (name, namespace, "redirector.io/imports: .", ip)

    far_slice = SLICE.replace("demo", "far")
    texts = [
        pods("a", "demo", "10.77.0.1"),
        pods("b", "demo", "10.77.0.2"),
        pods("c", "far", "10.77.0.3"),
        SERVICE,
        FAR,
        SLICE,
    ]
    ingester, lineage = Ingester(), Lineage()
    found = []
    for address in ("10.77.9.1", "10.77.9.2"):
        objects, _ = parse(
            "f.yaml", "\n---\n".join([*texts, far_slice.replace("10.77.0.1", address)])
        )
        generation = lineage.next(ingester.ingest(objects)[0])
        found.append(
            [
                generation.snapshot(node(*who))
                for who in (("a", "demo"), ("b", "demo"), ("c", "far"))
            ]
        )
    (a, b, c), (later_a, _, later_c) = found
    assert a.of(ENDPOINT) is b.of(ENDPOINT)
    assert a.of(ENDPOINT).version == later_a.of(ENDPOINT).version
    assert c.of(ENDPOINT).version != later_c.of(ENDPOINT).version
    assert set(a.of(ENDPOINT)) == {WEB}
    assert set(c.of(ENDPOINT)) == {FAR_WEB}


@pytest.mark.parametrize(
    ("default", "namespace", "pod", "closed"),
    [
        (None, "", "", False),
        (True, "", "", True),
        (True, "redirector.io/outboundPolicy: allow-any", "", False),
        (False, "redirector.io/outboundPolicy: registry-only", "", True),
        (
            False,
            "redirector.io/outboundPolicy: registry-only",
            "redirector.io/outboundPolicy: allow-any",
            False,
        ),
        # What nobody can read is no leave.
        (False, "", "redirector.io/outboundPolicy: registry", True),
        (False, "redirector.io/outboundPolicy: 3", "", True),
    ],
)
def test_where_applications_may_go(
    default: bool | None, namespace: str, pod: str, closed: bool
) -> None:
    mesh, problems = read(
        NAMESPACE % ("demo", namespace),
        POD % ("client", "demo", pod, "10.77.0.1"),
        SERVICE,
        defaults=Wishes(None, default),
    )
    wrong = any(word in namespace + pod for word in (": 3", "registry "))
    assert bool(problems) == (wrong or pod.endswith("registry"))
    expected = {"blackhole" if closed else "passthrough"}
    assert told(mesh, node("client", "demo"))["rest"] == expected
    if not pod:
        # A pod that nobody knows is its namespace's.
        assert told(mesh, node("stranger", "demo"))["rest"] == expected


def test_a_closed_pod_reaches_what_is_behind_headless_services() -> None:
    headless = SERVICE.replace("clusterIP: 10.96.77.1", "clusterIP: None")
    mesh, _ = read(
        POD % ("client", "demo", "redirector.io/outboundPolicy: registry-only", "10.77.0.9"),
        headless,
        SLICE,
        headless.replace("name: web", "name: twin"),
        SLICE.replace("web", "twin"),
    )
    assert told(mesh, node("client", "demo"))["chains"] == {"passthrough|8080|10.77.0.1"}


def test_no_endpoint_takes_a_services_place_in_a_closed_pod() -> None:
    """Envoy refuses a listener with two chains for one address and port, and all of it with it."""
    headless = FAR.replace("clusterIP: 10.96.77.2", "clusterIP: None")
    mesh, _ = read(
        POD % ("client", "demo", "redirector.io/outboundPolicy: registry-only", "10.77.0.9"),
        SERVICE,
        headless,
        SLICE.replace("demo", "far").replace("10.77.0.1", "10.96.77.1").replace("8080", "80"),
    )
    assert told(mesh, node("client", "demo"))["chains"] == {WEB}
