"""Objects in, a mesh and all problems out."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from xds_server.errors import Problem
from xds_server.ingest import ingest
from xds_server.ir import Mesh, Name, NodeId, Protocol
from xds_server.sources.files import parse
from xds_server.sources.objects import KubeObject

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "xds"
NODE = NodeId("10.77.0.11", "server", "demo")

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: demo}
spec: {clusterIP: 10.96.77.1, ports: [{name: http, port: 80}]}
"""
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: demo}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""
POLICY = """
apiVersion: policy.redirector.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: demo}
spec:
  selector: {matchLabels: {app: web}}
  rules: [{from: [{namespaces: [demo]}], to: [{paths: [/a]}]}]
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: demo, labels: {app: web}}
spec: {containers: [{ports: [{containerPort: 8080}]}]}
status: {podIP: 10.77.0.1}
"""
SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, namespace: demo, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.77.0.1]}]
"""
ALL = {
    "Service": SERVICE,
    "HTTPRoute": ROUTE,
    "AuthorizationPolicy": POLICY,
    "Pod": POD,
    "EndpointSlice": SLICE,
}


def read(*texts: str) -> tuple[Mesh, list[Problem]]:
    objects, problems = parse("f.yaml", "\n---\n".join(texts))
    assert problems == []
    return ingest(objects)


def changed(kind: str, path: str, value: Any) -> list[KubeObject]:
    """One good object of each kind, with a change to one of them: a dotted path, numbers are list
    indices."""
    documents = {name: yaml.safe_load(text) for name, text in ALL.items()}
    place = documents[kind]
    *steps, last = (int(step) if step.isdecimal() else step for step in path.split("."))
    for step in steps:
        place = place[step]
    place[last] = value
    return [KubeObject("f.yaml", document) for document in documents.values()]


def test_good_objects_have_no_problems() -> None:
    assert read(*ALL.values())[1] == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "problem"),
    [
        ("Service", "apiVersion", 1, "apiVersion: 1: must be a string"),
        ("Service", "metadata", None, "metadata.name: is required"),
        ("Service", "metadata.name", "We b", "metadata.name: 'We b': is not a name"),
        ("Service", "spec.ports", {}, "spec.ports: {}: must be a list"),
        ("Service", "spec.ports.0", 80, "spec.ports[0]: 80: must be a mapping"),
        ("Service", "spec.ports.0.port", 0, "spec.ports[0].port: 0: must be from 1 to 65535"),
        ("Service", "spec.ports.0.port", 65536, "port: 65536: must be from 1 to 65535"),
        ("Service", "spec.ports.0.port", "80", "port: '80': must be a number from 1 to 65535"),
        ("Service", "spec.ports.0.port", True, "port: True: must be a number"),
        ("Service", "spec.clusterIP", "10.0.0.256", "clusterIP: '10.0.0.256': is not an IP"),
        ("Service", "spec.ports.0.targetPort", 99999, "targetPort: 99999: must be from 1"),
        ("Service", "spec.ports.0.name", "\ud800", "must be valid Unicode"),
        ("Service", "spec.selector", [1], "spec.selector: [1]: must be a mapping"),
        ("Service", "spec.selector", {"a": 1}, "spec.selector.a: 1: must be a string; put it"),
        ("Pod", "status.podIP", "web", "status.podIP: 'web': is not an IP address"),
        ("Pod", "status.podIP", "::ffff:10.0.0.1", "'::ffff:10.0.0.1': is not an IP address"),
        (
            "EndpointSlice",
            "endpoints.0.addresses.0",
            "127.0.0.1",
            "'127.0.0.1': must not be a loopback, link-local or unspecified address",
        ),
        ("Pod", "status.podIP", "fe80::1%eth0", "'fe80::1%eth0': is not an IP address"),
        ("Pod", "spec.containers.0.ports.0.containerPort", -1, "containerPort: -1: must be from"),
        ("Pod", "spec.hostNetwork", "yes", "spec.hostNetwork: 'yes': must be true or false"),
        ("EndpointSlice", "addressType", "FQDN", "addressType: 'FQDN': must be IPv4 or IPv6"),
        ("EndpointSlice", "endpoints.0.addresses", [], "addresses: []: must not be empty"),
        ("EndpointSlice", "ports.0.port", 1 << 40, "ports[0].port: 1099511627776: must be"),
        ("HTTPRoute", "spec.parentRefs.0.name", "gone", "name: 'gone': there is no Service demo"),
        ("HTTPRoute", "spec.parentRefs.0.port", 81, "port: 81: Service demo/web has no such port"),
        ("HTTPRoute", "spec.rules", None, "spec.rules: is missing: every request is answered"),
        ("HTTPRoute", "spec.rules.0.backendRefs.0.port", 8, "port: 8: Service demo/web has no"),
        ("HTTPRoute", "spec.rules.0.backendRefs.0.kind", "Job", "kind: 'Job': only a Service"),
        ("HTTPRoute", "spec.rules.0.backendRefs.0.weight", -1, "weight: -1: must be from 0 to"),
        ("HTTPRoute", "spec.rules.0.backendRefs.0.weight", 1.5, "weight: 1.5: must be a number"),
        ("HTTPRoute", "spec.hostnames", ["10.0.0.1"], "hostnames[0]: '10.0.0.1': must not be an"),
        ("HTTPRoute", "spec.hostnames", ["a.*.b"], "hostnames[0]: 'a.*.b': is not a host name"),
        ("HTTPRoute", "spec.rules.0.timeouts", {"request": "5"}, "request: '5': is not a duration"),
        (
            "HTTPRoute",
            "spec.rules.0.timeouts",
            {"request": "1s", "backendRequest": "2s"},
            "backendRequest: '2s': must not be longer than timeouts.request",
        ),
        ("HTTPRoute", "spec.rules.0.sessionPersistence", {}, "sessionPersistence: {}: is not supp"),
        (
            "HTTPRoute",
            "spec.rules.0.filters",
            [{"type": "ExternalAuth", "externalAuth": {"protocol": "HTTP"}}],
            "filters[0].type: 'ExternalAuth': this filter is not supported",
        ),
        *(
            ("HTTPRoute", "spec.rules.0.filters", [{"type": "CORS", "cors": cors}], message)
            for cors, message in (
                (None, "filters[0].cors: is required"),
                ({"origins": []}, "cors.origins: []: is not supported"),
                ({"allowOrigins": ["example.com"]}, "'example.com': is not an origin such as"),
                ({"allowOrigins": ["ftp://a.b"]}, "'ftp://a.b': is not an origin such as"),
                ({"allowOrigins": ["http://a", "*"]}, "must not have '*' beside other entries"),
                ({"allowOrigins": ["http://a"] * 65}, "must have at most 64 entries"),
                ({"allowMethods": ["get"]}, "allowMethods[0]: 'get': must be one of GET"),
                ({"exposeHeaders": ["a b"]}, "exposeHeaders[0]: 'a b': is not a header name"),
                ({"maxAge": 0}, "cors.maxAge: 0: must be from 1"),
            )
        ),
        (
            "HTTPRoute",
            "spec.rules.0.filters",
            [{"type": "RequestHeaderModifier"}],
            "filters[0].requestHeaderModifier: is required",
        ),
        (
            "HTTPRoute",
            "spec.rules.0.filters",
            [
                {
                    "type": "RequestHeaderModifier",
                    "requestHeaderModifier": {"set": [{"name": "a", "value": "a" * 4097}]},
                }
            ],
            "set[0].value: 'aaaaaaaa",
        ),
        ("HTTPRoute", "spec.rules.0.matches", [None], "rules[0].matches[0]: must not be empty"),
        ("AuthorizationPolicy", "spec", None, "spec: is required"),
        # What is there but empty would otherwise hold for everything.
        ("AuthorizationPolicy", "spec.rules", [None], "spec.rules[0]: must not be empty; remove"),
        ("AuthorizationPolicy", "spec.selector", None, "spec.selector: must not be empty; remove"),
        ("AuthorizationPolicy", "spec.rules.0.from", None, "rules[0].from: must not be empty"),
        ("AuthorizationPolicy", "spec.rules.0.form", None, "rules[0].form: must not be empty"),
        ("AuthorizationPolicy", "spec.rules.0.from", [None], "from[0]: must not be empty"),
        ("AuthorizationPolicy", "spec.rules.0.from.0.namespaces", None, "namespaces: must not be"),
        ("AuthorizationPolicy", "spec.rules.0.to.0.paths", None, "to[0].paths: must not be empty"),
        ("AuthorizationPolicy", "spec.rules.0.when", {"headers": None}, "headers: must not be em"),
        ("AuthorizationPolicy", "metadata.namespace", "a.b", "namespace: 'a.b': is not a name"),
        ("AuthorizationPolicy", "spec.rule", [], "spec.rule: []: is not supported (known: target"),
        (
            "AuthorizationPolicy",
            "spec.action",
            "Deny",
            "action: 'Deny': must be one of ALLOW, DENY",
        ),
        ("AuthorizationPolicy", "spec.selector", {}, "matchLabels: must name a label; remove the"),
        ("AuthorizationPolicy", "spec.rules.0.from", [], "rules[0].from: []: must not be empty"),
        ("AuthorizationPolicy", "spec.rules.0.to.0", {}, "to[0]: {}: says nothing"),
        ("AuthorizationPolicy", "spec.rules.0.to.0.paths", ["a"], "paths[0]: 'a': must be a path"),
        ("AuthorizationPolicy", "spec.rules.0.to.0.paths", ["/a/.."], "must be a normalized path"),
        ("AuthorizationPolicy", "spec.rules.0.to.0.paths", ["/a%20"], "must be a normalized path"),
        ("AuthorizationPolicy", "spec.rules.0.to.0.paths", ["/a\n"], "must be a normalized path"),
        ("AuthorizationPolicy", "spec.rules.0.to.0.hosts", ["a:1"], "'a:1': must be a host name"),
        (
            "AuthorizationPolicy",
            "spec.rules.0.to.0.methods",
            ["G T"],
            "'G T': is not an HTTP method",
        ),
        ("AuthorizationPolicy", "apiVersion", "policy.redirector.io/v1", "has no such kind; use"),
        (
            "AuthorizationPolicy",
            "spec.rules.0.from",
            [{"cidrs": ["10.0.0.0/33"]}],
            "cidrs[0]: '10.0.0.0/33': is not a network",
        ),
        (
            "AuthorizationPolicy",
            "spec.rules.0.from",
            [{"cidrs": ["::ffff:10.0.0.0/104"]}],
            "cidrs[0]: '::ffff:10.0.0.0/104': is not a network",
        ),
        (
            "AuthorizationPolicy",
            "spec.rules.0.from",
            [{"serviceAccounts": ["a/b/c"]}],
            "serviceAccounts[0]: 'a/b/c': must be a service account's name",
        ),
    ],
)
def test_a_mistake_is_named(kind: str, path: str, value: Any, problem: str) -> None:
    found = [str(one) for one in ingest(changed(kind, path, value))[1]]
    assert any(problem in one for one in found), found
    assert all(one.startswith("f.yaml: ") for one in found)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "(",
        "[a",
        "a(?=b)",
        "(?<!a)b",
        r"(a)\1",
        "(?>a)",
        "a++",
        "a{1000,2000}",
        r"a\Z",
        "(?x)a",
        r"[\b]",
        r"[a\1]",
        r"[\u0041]",
        "[[:foo:]]",
        r"\é",
        r"[\é]",
        "(?P<é>a)",
        "(a{10}){101}",
        "(?:a{2}|b{600,}){2}",
        "((a{10}b){10}){11}",
        "(?:" + "ab" * 500 + "){999}",
    ],
)
def test_expressions_that_envoy_does_not_know(expression: str) -> None:
    value = {"path": {"type": "RegularExpression", "value": expression}}
    problems = ingest(changed("HTTPRoute", "spec.rules.0.matches", [value]))[1]
    assert [problem.field for problem in problems] == ["spec.rules[0].matches[0].path.value"]


@pytest.mark.parametrize(
    "expression",
    [
        r"\(?=",
        "[(?=]",
        "[+]+",
        r"\*+",
        "(?i)a",
        "(?P<n>a)",
        "a{9}",
        r"[\\b]",
        "[[:alpha:]]",
        "[é]",
        "[+--]",
        r"\b[\d\-]\n",
        "(a{10}[{9]{100}){10}",
        "(?:a{999}|b{999})(?:c{3}?)*",
    ],
)
def test_expressions_that_envoy_knows(expression: str) -> None:
    value = {"path": {"type": "RegularExpression", "value": expression}}
    assert ingest(changed("HTTPRoute", "spec.rules.0.matches", [value]))[1] == []


@pytest.mark.parametrize(
    ("one", "other", "problem"),
    [
        (SERVICE, SERVICE, "f.yaml has the same Service, which is in force; remove one of them"),
        (POD, POD.replace("web-1", "web-2"), "Pod demo/web-1 has 10.77.0.1, too"),
        (
            SERVICE,
            SERVICE.replace("name: web", "name: two"),
            "Service demo/web has 10.96.77.1, too",
        ),
        (SERVICE, POD.replace("10.77.0.1", "10.96.77.1"), "has 10.96.77.1, too"),
    ],
)
def test_objects_that_exclude_each_other(one: str, other: str, problem: str) -> None:
    assert [problem in str(found) for found in read(one, other)[1]] == [True]


def test_a_problem_is_one_printable_line() -> None:
    (problem,) = ingest(changed("HTTPRoute", "spec.\x1b[2J\n\ud800", "\x1b[2J\n"))[1]
    assert str(problem).startswith(
        r"f.yaml: HTTPRoute demo/web: spec.\x1b[2J \ud800: '\x1b[2J\n': is not supported"
    )


def test_all_problems_are_found_at_once() -> None:
    texts = [
        SERVICE.replace("port: 80", "port: 0"),
        POD.replace("10.77.0.1", "10.77"),
        POLICY.replace("/a", "a"),
    ]
    assert [problem.object for problem in read(*texts)[1]] == [
        "Pod demo/web-1",
        "Service demo/web",
        "AuthorizationPolicy demo/web",
    ]


@pytest.mark.parametrize(
    ("port", "protocol"),
    [
        ("name: http", Protocol.HTTP),
        ("name: http-web", Protocol.HTTP),
        ("name: http8080", Protocol.HTTP),
        ("name: https", Protocol.TCP),
        ("name: http2-x", Protocol.HTTP2),
        ("name: grpc", Protocol.HTTP2),
        ("name: web", Protocol.TCP),
        ("name: tcp-http", Protocol.TCP),
        ("name: http, appProtocol: tcp", Protocol.TCP),
        ("name: web, appProtocol: HTTP", Protocol.HTTP),
        ("name: web, appProtocol: kubernetes.io/h2c", Protocol.HTTP2),
        ("name: http, appProtocol: example.com/own", Protocol.TCP),
    ],
)
def test_protocol_of_a_port(port: str, protocol: Protocol) -> None:
    mesh, problems = read(SERVICE.replace("name: http", port))
    assert problems == []
    assert mesh.services[Name("demo", "web")].ports[0].protocol is protocol


def test_a_route_makes_an_undeclared_port_http() -> None:
    service = SERVICE.replace("name: http", "name: web")
    parts = (service, POD, SLICE.replace("name: http", "name: web"))
    for texts, protocol in ((parts, Protocol.TCP), ((*parts, ROUTE), Protocol.HTTP)):
        mesh, problems = read(*texts)
        assert problems == []
        assert mesh.services[Name("demo", "web")].ports[0].protocol is protocol
        assert mesh.workloads[Name("demo", "web-1")].ports[0].protocol is protocol


def test_a_slice_says_nothing_of_another_namespaces_pods() -> None:
    far = POD.replace("demo", "far")
    reference = "targetRef: {kind: Pod, name: web-1, namespace: far}"
    by_name = SLICE.replace("[10.77.0.1]", f"[10.77.0.9], {reference}")
    for piece in (SLICE, by_name):
        mesh, problems = read(SERVICE, far, piece)
        assert problems == []
        (port,) = mesh.workloads[Name("far", "web-1")].ports
        assert port.protocol is Protocol.TCP


@pytest.mark.parametrize(
    ("target", "pods"),
    [
        ("", None),
        ("selector: {matchLabels: {app: web}}", {"web-1", "web-2"}),
        ("targetRefs: [{kind: Pod, name: web-2}]", {"web-2"}),
        # By its selector, before any slice names the pod, and by its slices without a selector.
        ("targetRefs: [{kind: Service, name: chosen}]", {"web-1", "web-2"}),
        ("targetRefs: [{kind: Service, name: web}]", {"web-1"}),
    ],
)
def test_whom_a_policy_holds_for(target: str, pods: set[str] | None) -> None:
    chosen = SERVICE.replace("name: web", "name: chosen").replace(
        "clusterIP: 10.96.77.1", "selector: {app: web}"
    )
    second = POD.replace("web-1", "web-2").replace("10.77.0.1", "10.77.0.2")
    far = POD.replace("demo", "far").replace("10.77.0.1", "10.77.0.3")
    policy = POLICY.replace("selector: {matchLabels: {app: web}}", target)
    slices = SLICE.replace("10.77.0.1", "10.77.0.1, 10.77.0.3")
    mesh, problems = read(SERVICE, chosen, POD, second, far, slices, policy)
    assert problems == []
    targets = mesh.policies[0].targets
    if pods is None:
        assert targets is None
    else:
        assert targets is not None
        assert {name.name for name in targets if name.namespace == "demo"} == pods


def test_a_foreign_object_needs_no_name() -> None:
    kustomization = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization"
    mesh, problems = read(kustomization)
    assert problems == []
    assert mesh.ignored == ("Kustomization (kustomize.config.k8s.io/v1beta1)",)
    _, problems = read("apiVersion: v1\nkind: Service\nmetadata: {}")
    assert "metadata.name" in str(problems[0])


def test_what_is_of_no_use_is_told() -> None:
    gateway = ROUTE.replace('group: "", kind: Service', "kind: Gateway")
    config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, namespace: demo}"
    mesh, problems = read(gateway, config, "apiVersion: v1\nkind: Namespace\nmetadata: {name: x}")
    assert problems == []
    assert mesh.ignored == (
        "ConfigMap demo/a (v1)",
        "HTTPRoute demo/web (no parent is a Service: kind Service of group '')",
    )
    assert mesh.routes == ()


def _good_documents() -> list[Any]:
    texts = (path.read_text() for path in sorted(GOLDEN.glob("*.in.yaml")))
    return [
        dict(entry.data) for text in texts for entry in parse("f", text)[0] if "spec" in entry.data
    ]


DOCUMENTS = _good_documents()


def test_the_crd_and_the_reader_know_the_same_fields() -> None:
    """Every golden policy fits the schema, and every field of the schema is read."""
    crd = yaml.safe_load((ROOT / "manifests/crds/authorizationpolicies.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    seen: set[str] = set()
    for document in DOCUMENTS:
        problems = ingest([KubeObject("f", document)])[1]
        if document["kind"] == "AuthorizationPolicy" and not any(
            "must" in problem.message or "not supported" in problem.message for problem in problems
        ):
            _fits(document["spec"], schema, "spec", seen)
    known = set(_paths(schema, "spec"))
    assert known - seen == set()
    for path in known:
        assert "not supported" not in " ".join(
            str(problem) for problem in ingest(changed("AuthorizationPolicy", *_sample(path)))[1]
        )


_TYPES = {"object": dict, "array": list, "string": str, "integer": int}


def _fits(value: Any, schema: Any, path: str, seen: set[str]) -> None:
    assert isinstance(value, _TYPES[schema["type"]]), path
    assert value in schema.get("enum", [value]), path
    if isinstance(value, dict) and "properties" in schema:
        assert set(schema.get("required", [])) <= set(value), path
        for key, inner in value.items():
            assert key in schema["properties"], f"{path}.{key}"
            seen.add(f"{path}.{key}")
            _fits(inner, schema["properties"][key], f"{path}.{key}", seen)
    elif isinstance(value, list):
        for inner in value:
            _fits(inner, schema["items"], path, seen)


def _paths(schema: Any, path: str) -> list[str]:
    found = []
    for key, inner in schema.get("properties", {}).items():
        found += [f"{path}.{key}", *_paths(inner, f"{path}.{key}")]
    return found + (_paths(schema["items"], path) if "items" in schema else [])


def _sample(path: str) -> tuple[str, Any]:
    """A place in the good policy, and a value that has the field at `path`."""
    first, *rest = path.removeprefix("spec.").split(".")
    value: Any = None
    for key in reversed(rest):
        value = {key: "x" if value is None else value}
        if key in ("from", "to", "headers"):
            value = {key: [value[key]]}
    return f"spec.{first}", [value] if first in ("rules", "targetRefs") else value


@pytest.mark.parametrize("port", [15000, 15001, 15006, 15020, 15021, 15053, 15090])
def test_a_name_leads_to_no_sidecars_own_port(port: int) -> None:
    """It may resolve to the client itself, whose sidecar is not for those who write services."""
    named = SERVICE.replace(
        "clusterIP: 10.96.77.1", "type: ExternalName, externalName: db.example.com"
    )
    mesh, problems = read(named.replace("port: 80", f"port: {port}"))
    assert mesh.services == {}
    assert "is a sidecar's own, which a name must not lead to" in str(problems[0])
    bare = named.replace(", ports: [{name: http, port: 80}]", "").replace("web", "db")
    route = ROUTE.replace(
        "backendRefs: [{name: web, port: 80}", f"backendRefs: [{{name: db, port: {port}}}"
    )
    mesh, problems = read(SERVICE, bare, route)
    assert ["Service demo/db has no such port" in str(problem) for problem in problems] == [True]
    assert list(mesh.routes[0].rules[0].destinations) == []
