"""Where TrafficPolicies hold, who wins a conflict, and what the status of policies tells."""

from typing import Any

import pytest
import yaml
from xds_server.conditions import ObjectStatus
from xds_server.errors import Problem
from xds_server.ingest import Ingester, ingest
from xds_server.ir import Mesh, Name, Parent, PodPort
from xds_server.sources.files import parse

WORLD = """
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: demo, labels: {app: web}}
spec: {containers: [{ports: [{name: http, containerPort: 8080}, {name: db, containerPort: 5432}]}]}
status: {podIP: 10.77.0.1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: demo}
spec:
  clusterIP: 10.96.0.1
  ports: [{name: http, port: 80}, {name: db, port: 5432, appProtocol: tcp}]
---
apiVersion: v1
kind: Service
metadata: {name: same, namespace: demo}
spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, namespace: demo, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: db, port: 5432}]
endpoints: [{addresses: [10.77.0.1], conditions: {ready: false}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: same, namespace: demo, labels: {kubernetes.io/service-name: same}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.77.0.1]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: demo}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules:
    - {name: one, matches: [{path: {value: /1}}], backendRefs: [{name: web, port: 80}]}
    - {name: two, matches: [{path: {value: /2}}], backendRefs: [{name: web, port: 80}]}
    - {matches: [{path: {value: /3}}], backendRefs: [{name: web, port: 80}]}
"""
GRPC_ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: web, namespace: demo}
spec:
  parentRefs: [{group: "", kind: Service, name: same}]
  rules: [{name: one, backendRefs: [{name: same, port: 80}]}]
"""
HTTP, DB = Parent(Name("demo", "web"), 80), Parent(Name("demo", "web"), 5432)
POD = Name("demo", "web-1")
LIMIT = {"rateLimit": {"requests": 7}}


def service(name: str = "web", section: str | None = None) -> dict[str, str]:
    return {"kind": "Service", "name": name} | ({"sectionName": section} if section else {})


def route(section: str | None = None) -> dict[str, str]:
    found = {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "web"}
    return found | ({"sectionName": section} if section else {})


def policy(
    name: str, *targets: Any, created: str = "", kind: str = "TrafficPolicy", **parts: Any
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "demo", "generation": 4}
    if created:
        metadata["creationTimestamp"] = f"2026-01-{created}T00:00:00Z"
    spec = {"targetRefs": list(targets), **parts}
    return {
        "apiVersion": "policy.redirector.io/v1alpha1",
        "kind": kind,
        "metadata": metadata,
        "spec": spec,
    }


def read(*policies: dict[str, Any]) -> tuple[Mesh, list[Problem]]:
    return ingest(parse("f.yaml", _text(*policies))[0])


def _text(*policies: dict[str, Any]) -> str:
    return "\n---\n".join([WORLD, *map(yaml.safe_dump, policies)])


def told(mesh: Mesh, name: str) -> list[list[tuple[str, bool, str]]]:
    """The conditions of a policy under each target."""
    status = status_of(mesh, name)
    assert status.generation == 4
    return [[(c.type, c.status, c.reason) for c in p.conditions] for p in status.parents]


def status_of(mesh: Mesh, name: str) -> ObjectStatus:
    (found,) = (s for s in mesh.statuses if s.name == name and s.kind != "HTTPRoute")
    return found


ACCEPTED = [("Accepted", True, "Accepted")]
CONFLICTED = [("Accepted", False, "Conflicted"), ("Conflicted", True, "Conflicted")]
NOT_FOUND = [("Accepted", False, "TargetNotFound")]


def test_a_policy_holds_for_a_services_clients_and_for_its_pods_ready_or_not() -> None:
    mesh, problems = read(policy("it", service(), **LIMIT))
    assert problems == []
    (found,) = mesh.traffic
    assert found.services == {HTTP, DB}
    assert found.pods == {PodPort(POD, 8080), PodPort(POD, 5432)}
    assert told(mesh, "it") == [ACCEPTED]


def test_what_concerns_only_clients_takes_no_pod() -> None:
    mesh, _ = read(policy("it", service(), loadBalancer={"type": "Random"}))
    assert mesh.traffic[0].services == {HTTP, DB}
    assert mesh.traffic[0].pods == frozenset()


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (policy("a", service(), created="02"), policy("b", service(), created="01"), "b"),
        (policy("a", service(), created="02"), policy("b", service(), created="03"), "a"),
        (policy("b", service(), created="02"), policy("a", service(), created="02"), "a"),
        # What has an age is older than what has none.
        (policy("a", service()), policy("b", service(), created="02"), "b"),
        (policy("b", route("one")), policy("a", route("one")), "a"),
        (policy("b", service("web", "http")), policy("a", service("web", "80")), "a"),
    ],
)
def test_the_older_policy_wins(first: Any, second: Any, winner: str) -> None:
    for one in (first, second):
        one["spec"] |= LIMIT
    mesh, problems = read(first, second)
    loser = {"a": "b", "b": "a"}[winner]
    assert (told(mesh, winner), told(mesh, loser)) == ([ACCEPTED], [CONFLICTED])
    (problem,) = problems
    assert problem.object == f"TrafficPolicy demo/{loser}"
    assert f"TrafficPolicy demo/{winner} is older and holds here" in problem.message
    beaten = next(one for one in mesh.traffic if one.name.name == loser)
    assert (beaten.services, beaten.pods) == (frozenset(), frozenset())


def test_a_port_goes_before_its_service_and_a_rule_before_its_route() -> None:
    mesh, problems = read(
        policy("all", service(), created="01", **LIMIT),
        policy("port", service("web", "db"), rateLimit={"requests": 8}),
        policy("route", route(), created="01", **LIMIT),
        policy("rule", route("two"), faultInjection={"abort": {"httpStatus": 500}}),
    )
    assert problems == []
    held = {one.name.name: (one.services, one.pods) for one in mesh.traffic}
    assert held["all"] == ({HTTP}, {PodPort(POD, 8080)})
    assert held["port"] == ({DB}, {PodPort(POD, 5432)})
    limits = [
        (rule.rate_limit is not None, rule.fault is not None) for rule in mesh.routes[0].rules
    ]
    # As a whole: the named rule has the fault and not the route's limit.
    assert limits == [(True, False), (False, True), (True, False)]
    assert all(told(mesh, name) == [ACCEPTED] for name in ("all", "port", "route", "rule"))


def test_routes_of_both_kinds_have_policies_of_their_own() -> None:
    grpc = {**route("one"), "kind": "GRPCRoute"}
    mesh, problems = read(
        yaml.safe_load(GRPC_ROUTE),
        policy("http", route("one"), **LIMIT),
        policy("grpc", grpc, faultInjection={"abort": {"grpcStatus": 14}}),
    )
    assert problems == []
    given = {
        made.kind.value: [
            (rule.rate_limit is not None, rule.fault is not None) for rule in made.rules
        ]
        for made in mesh.routes
    }
    assert given["HTTPRoute"][0] == (True, False)
    assert given["GRPCRoute"] == [(False, True)]


def test_two_services_before_one_port_cannot_both_be_obeyed() -> None:
    mesh, problems = read(
        policy("old", service("web"), created="01", **LIMIT),
        policy("new", service("same"), created="02", **LIMIT),
    )
    held = {one.name.name: one.pods for one in mesh.traffic}
    assert held["old"] == {PodPort(POD, 8080), PodPort(POD, 5432)}
    assert held["new"] == frozenset()
    assert told(mesh, "new") == [[*ACCEPTED, ("PartiallyInvalid", True, "Conflicted")]]
    (problem,) = problems
    assert "another Service leads to port 8080 of pod demo/web-1" in problem.message


@pytest.mark.parametrize(
    ("target", "field", "message"),
    [
        (service("none"), "targetRefs[0].name", "there is no Service demo/none"),
        (service("web", "no"), "targetRefs[0].sectionName", "has no port no, but http, db"),
        (route("no"), "targetRefs[0].sectionName", "has no rule named no"),
        (route() | {"name": "no"}, "targetRefs[0].name", "there is no HTTPRoute demo/no"),
        (route() | {"kind": "GRPCRoute"}, "targetRefs[0].name", "there is no GRPCRoute demo/web"),
    ],
)
def test_a_target_that_is_not_there_is_told_and_harms_no_other(
    target: Any, field: str, message: str
) -> None:
    mesh, problems = read(policy("it", target, service("same"), **LIMIT))
    (problem,) = problems
    assert problem.field == f"spec.{field}"
    assert message in problem.message
    assert told(mesh, "it") == [NOT_FOUND, ACCEPTED]
    assert mesh.traffic[0].services == {Parent(Name("demo", "same"), 80)}


def test_a_fault_on_a_port_that_is_not_http_is_told() -> None:
    fault = {"abort": {"httpStatus": 500}}
    mesh, (problem,) = read(policy("it", service(), faultInjection=fault))
    assert told(mesh, "it") == [[*ACCEPTED, ("PartiallyInvalid", True, "UnsupportedValue")]]
    assert "no effect on ports that are not HTTP: 5432 of Service demo/web" in problem.message


@pytest.mark.parametrize(
    ("spec", "parts", "message"),
    [
        (
            {"type": "ExternalName", "externalName": "example.org"},
            LIMIT,
            "rateLimit, connectionLimit and accessLog: no effect on Services of type ExternalName",
        ),
        (
            {"clusterIP": "None"},
            {"faultInjection": {"abort": {"httpStatus": 500}}},
            "no effect on Services without an address, whose pods are asked directly: demo/odd",
        ),
    ],
)
def test_what_a_kind_of_service_cannot_have_is_told(spec: Any, parts: Any, message: str) -> None:
    ports = [{"name": "http", "port": 80}]
    odd = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "odd", "namespace": "demo"},
        "spec": {**spec, "ports": ports},
    }
    _, (problem,) = read(odd, policy("it", service("odd"), **parts))
    assert message in problem.message


def test_a_bad_policy_says_so_and_its_last_good_form_stays() -> None:
    ingester = Ingester()
    good, bad = policy("it", service(), **LIMIT), policy("it", service(), rateLimit={})
    never = policy("never", service("same"), rateLimit={"requests": 0})
    ingester.ingest(parse("f.yaml", _text(good))[0])
    mesh, _ = ingester.ingest(parse("f.yaml", _text(bad, never))[0])
    assert [one.name.name for one in mesh.traffic] == ["it"]
    for name, instead in (("it", "last good form stays"), ("never", "it has no effect")):
        (parent,) = status_of(mesh, name).parents
        (condition,) = parent.conditions
        assert (condition.status, condition.reason) == (False, "Invalid")
        assert "spec.rateLimit.requests" in condition.message
        assert instead in condition.message


def test_what_is_told_of_authorization_policies() -> None:
    kind = "AuthorizationPolicy"
    pod, none = {"kind": "Pod", "name": "web-1"}, {"kind": "Pod", "name": "none"}
    everywhere = policy("all", kind=kind)
    del everywhere["spec"]["targetRefs"]
    broken = policy("broken", pod, kind=kind, rules=[{"from": []}])
    hopeless = policy("hopeless", kind=kind, action="MAYBE")
    mesh, _ = read(policy("two", pod, none, kind=kind), everywhere, broken, hopeless)
    assert told(mesh, "two") == [ACCEPTED, NOT_FOUND]
    assert [c.reason for c in status_of(mesh, "all").conditions] == ["Accepted"]
    ((condition,),) = (parent.conditions for parent in status_of(mesh, "broken").parents)
    assert condition.reason == "Invalid"
    assert "everything is refused in its place" in condition.message
    (condition,) = status_of(mesh, "hopeless").conditions
    assert condition.reason == "Invalid"
