"""What the schemas of our kinds accept is what is read, and what they refuse is refused."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from crds import CRDS, refusals, schema_of
from envoy_static import refused_by_envoy
from xds_server.errors import Problem
from xds_server.ingest import ingest
from xds_server.ir import Mesh, NodeId
from xds_server.sources.objects import KubeObject
from xds_server.statuses import Replica, patch
from xds_server.translate import translate

GATEWAY = "gateway.networking.k8s.io"
OBJECTS: list[dict[str, Any]] = [
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "demo"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]},
    },
    {
        "apiVersion": f"{GATEWAY}/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "web", "namespace": "demo"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
            "rules": [{"name": "all", "backendRefs": [{"name": "web", "port": 80}]}],
        },
    },
    {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web-1", "namespace": "demo"},
        "status": {"podIP": "10.77.0.1"},
    },
]
SERVICE = {"kind": "Service", "name": "web"}
ROUTE = {"group": GATEWAY, "kind": "HTTPRoute", "name": "web"}
BASES: dict[str, dict[str, Any]] = {
    "TrafficPolicy": {"targetRefs": [SERVICE], "connectionLimit": {"maxConnections": 9}},
    "AuthorizationPolicy": {"targetRefs": [SERVICE], "rules": [{}]},
}


def ingested(kind: str, spec: Any) -> tuple[Mesh, list[Problem]]:
    """What the server makes of an object with this spec."""
    policy = {
        "apiVersion": "policy.redirector.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": "it", "namespace": "demo", "generation": 2},
        "spec": spec,
    }
    objects = [*deepcopy(OBJECTS), policy]
    return ingest([KubeObject("f", entry) for entry in objects])


def read(kind: str, spec: Any) -> list[Problem]:
    return ingested(kind, spec)[1]


def spec_of(kind: str, part: str, value: Any) -> dict[str, Any]:
    spec = deepcopy(BASES[kind])
    place = spec
    *before, last = part.split(".")
    for key in before:
        place = place.setdefault(key, {})
    place[last] = value
    return spec


TRAFFIC_GOOD: list[tuple[str, Any]] = [
    ("targetRefs", [{**SERVICE, "group": ""}]),
    ("targetRefs", [{**SERVICE, "sectionName": "http"}, {**SERVICE, "sectionName": "80"}]),
    ("rateLimit", {"requests": 1}),
    ("rateLimit", {"requests": 100, "interval": "50ms", "burst": 2**31 - 1}),
    ("rateLimit", {"requests": 100, "interval": "23h59m60s"}),
    ("faultInjection", {"delay": {"fixedDelay": "1ms", "percentage": 0.0001}}),
    ("faultInjection", {"abort": {"grpcStatus": 16, "percentage": 100}}),
    ("faultInjection", {"delay": {"fixedDelay": "1h"}, "abort": {"httpStatus": 200}}),
    ("outlierDetection", {}),
    ("outlierDetection", {"consecutive5xxErrors": 1, "maxEjectionPercent": 0}),
    ("outlierDetection", {"baseEjectionTime": "10m"}),
    ("outlierDetection", {"baseEjectionTime": "10m", "maxEjectionTime": "600s"}),
    ("circuitBreaker", {"maxRetries": 0}),
    ("loadBalancer", {"type": "Random"}),
    ("loadBalancer", {"type": "Maglev", "hashOn": [{"type": "SourceIP"}]}),
    ("loadBalancer", {"type": "RingHash", "hashOn": [{"type": "Header", "header": "X-A"}]}),
    (
        "loadBalancer",
        {
            "type": "RingHash",
            "hashOn": [
                {"type": "Cookie", "cookie": {"name": "a"}},
                {"type": "Cookie", "cookie": {"name": "b", "ttl": "0s", "path": "/x"}},
            ],
        },
    ),
    ("accessLog", [{}]),
    ("accessLog", [{"type": "Stdout", "format": "Text", "text": "%PROTOCOL% 1%%\n"}]),
    ("accessLog", [{"type": "File", "path": "/dev/null", "format": "JSON", "json": {"a": "b"}}]),
    ("accessLog", [{"filter": {"minStatus": 500, "maxStatus": 500}}]),
]

TRAFFIC_BAD: list[tuple[str, Any]] = [
    ("targetRefs", []),
    ("targetRefs", [SERVICE, {**SERVICE, "group": ""}]),
    ("targetRefs", [{**SERVICE, "group": GATEWAY}]),
    ("targetRefs", [{"kind": "HTTPRoute", "name": "web"}]),
    ("targetRefs", [{"kind": "Pod", "name": "web"}]),
    ("targetRefs", [{"kind": "Service"}]),
    ("targetRefs", [{"group": GATEWAY, "name": "web"}]),
    ("targetRefs", [{"kind": "", "name": "web"}]),
    ("targetRefs", [{"kind": "Service", "name": "A b"}]),
    ("targetRefs", [{**SERVICE, "sectionName": ""}]),
    ("targetRefs", [{**SERVICE, "namespace": "other"}]),
    ("targetRefs", [{"kind": "Service", "name": f"n{n}"} for n in range(17)]),
    # The base has a limit of connections, which a route knows nothing of.
    ("targetRefs", [ROUTE]),
    ("targetRefs", [SERVICE, ROUTE]),
    ("rateLimit", {}),
    ("rateLimit", {"requests": 0}),
    ("rateLimit", {"requests": "1"}),
    ("rateLimit", {"requests": 1.5}),
    ("rateLimit", {"requests": 1, "interval": "49ms"}),
    ("rateLimit", {"requests": 1, "interval": "25h"}),
    ("rateLimit", {"requests": 1, "interval": "1 s"}),
    ("rateLimit", {"requests": 1, "interval": 1}),
    ("rateLimit", {"requests": 1, "burst": 0}),
    ("rateLimit", {"requests": 1, "unit": "s"}),
    ("faultInjection", {}),
    ("faultInjection", {"delay": {}}),
    ("faultInjection", {"delay": {"fixedDelay": "0s"}}),
    ("faultInjection", {"delay": {"fixedDelay": "61m"}}),
    ("faultInjection", {"delay": {"fixedDelay": "1s", "percentage": 101}}),
    ("faultInjection", {"delay": {"fixedDelay": "1s", "percentage": -0.1}}),
    ("faultInjection", {"delay": {"fixedDelay": "1s", "percentage": True}}),
    ("faultInjection", {"abort": {"percentage": 1}}),
    ("faultInjection", {"abort": {"httpStatus": 500, "grpcStatus": 1}}),
    ("faultInjection", {"abort": {"httpStatus": 199}}),
    ("faultInjection", {"abort": {"grpcStatus": 17}}),
    ("outlierDetection", {"consecutive5xxErrors": 0}),
    ("outlierDetection", {"interval": "0s"}),
    ("outlierDetection", {"maxEjectionPercent": 101}),
    ("outlierDetection", {"maxEjectionTime": "29s"}),
    ("outlierDetection", {"baseEjectionTime": "2m", "maxEjectionTime": "1m"}),
    ("circuitBreaker", {}),
    ("circuitBreaker", {"maxConnections": -1}),
    ("circuitBreaker", {"maxThreads": 1}),
    ("loadBalancer", {}),
    ("loadBalancer", {"type": "Best"}),
    ("loadBalancer", {"type": "RingHash"}),
    ("loadBalancer", {"type": "RingHash", "hashOn": []}),
    ("loadBalancer", {"type": "Random", "hashOn": [{"type": "SourceIP"}]}),
    ("loadBalancer", {"type": "Maglev", "hashOn": [{}]}),
    ("loadBalancer", {"type": "Maglev", "hashOn": [{"type": "Header"}]}),
    ("loadBalancer", {"type": "Maglev", "hashOn": [{"type": "Header", "header": "a b"}]}),
    ("loadBalancer", {"type": "Maglev", "hashOn": [{"type": "SourceIP", "header": "a"}]}),
    ("loadBalancer", {"type": "Maglev", "hashOn": [{"type": "Cookie"}]}),
    ("loadBalancer", {"type": "Maglev", "hashOn": [{"type": "Cookie", "cookie": {}}]}),
    (
        "loadBalancer",
        {"type": "Maglev", "hashOn": [{"type": "Cookie", "cookie": {"name": "a", "path": "/"}}]},
    ),
    (
        "loadBalancer",
        {
            "type": "Maglev",
            "hashOn": [{"type": "Cookie", "cookie": {"name": "a", "ttl": "1s", "path": "a;b"}}],
        },
    ),
    (
        "loadBalancer",
        {"type": "Maglev", "hashOn": [{"type": "Cookie", "cookie": {"name": "a", "ttl": "9601h"}}]},
    ),
    ("loadBalancer", {"type": "Maglev", "hashOn": [{"type": "SourceIP"}] * 9}),
    ("connectionLimit", {}),
    ("connectionLimit", {"maxConnections": 0}),
    ("accessLog", []),
    ("accessLog", [{}] * 5),
    ("accessLog", [{"type": "Kafka"}]),
    ("accessLog", [{"type": "File"}]),
    ("accessLog", [{"type": "File", "path": "x"}]),
    ("accessLog", [{"type": "File", "path": "/x\n"}]),
    ("accessLog", [{"path": "/dev/null"}]),
    ("accessLog", [{"format": "XML"}]),
    ("accessLog", [{"json": {"a": "b"}}]),
    ("accessLog", [{"format": "JSON", "text": "a"}]),
    ("accessLog", [{"format": "JSON", "json": {}}]),
    ("accessLog", [{"format": "JSON", "json": {"a": 1}}]),
    ("accessLog", [{"text": ""}]),
    ("accessLog", [{"text": "\0"}]),
    ("accessLog", [{"filter": {}}]),
    ("accessLog", [{"filter": {"minStatus": 99}}]),
    ("accessLog", [{"filter": {"minStatus": 500, "maxStatus": 400}}]),
    ("retries", 3),
]

AUTHORIZATION_GOOD: list[tuple[str, Any]] = [
    ("action", "DENY"),
    ("targetRefs", [{"group": "", "kind": "Pod", "name": "web-1"}]),
    ("rules", []),
    ("rules", [{"from": [{"namespaces": ["demo"], "serviceAccounts": ["a", "b/c"]}]}]),
    ("rules", [{"from": [{"cidrs": ["10.0.0.0/8", "fd00::/8", "10.0.0.1"]}]}]),
    ("rules", [{"to": [{"methods": ["GET"], "paths": ["/a", "/b/*", "*"], "ports": [65535]}]}]),
    ("rules", [{"to": [{"hosts": ["a.b", "*.b", "b.*", "*"]}]}]),
    ("rules", [{"when": {"headers": [{"name": "X-A", "value": ""}]}}]),
    ("rules", [{"when": {"headers": [{"name": "a", "type": "Prefix", "value": "b"}]}}]),
]

AUTHORIZATION_BAD: list[tuple[str, Any]] = [
    ("action", "AUDIT"),
    ("selector", {"matchLabels": {"a": "b"}}),
    ("targetRefs", []),
    ("targetRefs", [{"kind": "Deployment", "name": "web"}]),
    ("targetRefs", [{"group": "apps", "kind": "Pod", "name": "web-1"}]),
    ("rules", [{"from": []}]),
    ("rules", [{"from": [{}]}]),
    ("rules", [{"from": [{"namespaces": []}]}]),
    ("rules", [{"from": [{"namespaces": ["A"]}]}]),
    ("rules", [{"from": [{"serviceAccounts": ["a/b/c"]}]}]),
    ("rules", [{"from": [{"serviceAccounts": ["/a"]}]}]),
    ("rules", [{"from": [{"ips": ["10.0.0.1"]}]}]),
    ("rules", [{"to": []}]),
    ("rules", [{"to": [{}]}]),
    ("rules", [{"to": [{"methods": [""]}]}]),
    ("rules", [{"to": [{"methods": ["GET "]}]}]),
    ("rules", [{"to": [{"paths": ["a"]}]}]),
    ("rules", [{"to": [{"paths": ["/a*b"]}]}]),
    ("rules", [{"to": [{"paths": ["/a?b"]}]}]),
    ("rules", [{"to": [{"paths": ["/a%20b"]}]}]),
    ("rules", [{"to": [{"paths": ["/a/../b"]}]}]),
    ("rules", [{"to": [{"paths": ["/a//b"]}]}]),
    ("rules", [{"to": [{"paths": ["/a\n"]}]}]),
    ("rules", [{"to": [{"hosts": ["a*b"]}]}]),
    ("rules", [{"to": [{"hosts": ["a:80"]}]}]),
    ("rules", [{"to": [{"hosts": [""]}]}]),
    ("rules", [{"to": [{"ports": [0]}]}]),
    ("rules", [{"to": [{"ports": ["80"]}]}]),
    ("rules", [{"when": {"headers": []}}]),
    ("rules", [{"when": {"headers": [{"name": "a"}]}}]),
    ("rules", [{"when": {"headers": [{"name": "a b", "value": "c"}]}}]),
    ("rules", [{"when": {"headers": [{"name": "Host", "value": "c"}]}}]),
    ("rules", [{"when": {"headers": [{"name": "a", "type": "Prefix", "value": ""}]}}]),
    ("rules", [{"when": {"headers": [{"name": "a", "type": "RegularExpression", "value": ""}]}}]),
    ("rules", [{"when": {"headers": [{"name": "a", "type": "Suffix", "value": "x"}]}}]),
    ("rules", [{"until": {}}]),
]

GOOD = [("TrafficPolicy", *case) for case in TRAFFIC_GOOD]
GOOD += [("AuthorizationPolicy", *case) for case in AUTHORIZATION_GOOD]
BAD = [("TrafficPolicy", *case) for case in TRAFFIC_BAD]
BAD += [("AuthorizationPolicy", *case) for case in AUTHORIZATION_BAD]


@pytest.mark.parametrize(("kind", "part", "value"), GOOD)
def test_what_is_good_is_good_to_both(kind: str, part: str, value: Any) -> None:
    spec = spec_of(kind, part, value)
    assert refusals(kind, spec) == []
    assert read(kind, spec) == []


@pytest.mark.parametrize(("kind", "part", "value"), BAD)
def test_what_is_bad_is_bad_to_both(kind: str, part: str, value: Any) -> None:
    spec = spec_of(kind, part, value)
    assert refusals(kind, spec) != []
    problems = read(kind, spec)
    assert problems != []
    for problem in problems:
        assert problem.object == f"{kind} demo/it"
        assert problem.field.startswith("spec")
        assert problem.message


def test_envoy_takes_all_that_is_good(tmp_path: Path) -> None:
    """Each policy has a Service and a port of the one pod."""
    objects: list[dict[str, Any]] = []
    endpoint = {"addresses": ["10.77.0.1"]}
    for number, (part, value) in enumerate(TRAFFIC_GOOD):
        name, port = f"s{number}", 8000 + number
        metadata = {"name": name, "namespace": "demo"}
        spec = spec_of("TrafficPolicy", part, value)
        spec["targetRefs"] = [{"kind": "Service", "name": name}]
        objects += [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": metadata,
                "spec": {"clusterIP": f"10.96.1.{number}", "ports": [{"name": "http", "port": 80}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": port}],
                "endpoints": [endpoint],
            },
            {
                "apiVersion": "policy.redirector.io/v1alpha1",
                "kind": "TrafficPolicy",
                "metadata": metadata,
                "spec": spec,
            },
        ]
    everything = [KubeObject("f", entry) for entry in [*deepcopy(OBJECTS), *objects]]
    mesh, problems = ingest(everything)
    assert problems == []
    assert all(policy.services and policy.pods for policy in mesh.traffic)
    node = NodeId("10.77.0.1", "web-1", "demo")
    assert refused_by_envoy(translate(mesh, node), tmp_path) == ""


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("accessLog", [{"text": "%NONSENSE%"}], "%NONSENSE% is not known"),
        ("accessLog", [{"text": "%REQ%"}], "must be written as %REQ(:PATH)%"),
        ("accessLog", [{"text": "%REQ(x):5% %PROTOCOL:5%"}], "%PROTOCOL% takes no length"),
        ("accessLog", [{"text": "100%"}], "has a % that begins no command"),
        ("accessLog", [{"format": "JSON", "json": {"a": "%DURATION(x)%"}}], "must be written as"),
    ],
)
def test_only_the_server_reads_formats(part: str, value: Any, message: str) -> None:
    spec = spec_of("TrafficPolicy", part, value)
    assert refusals("TrafficPolicy", spec) == []
    (problem,) = read("TrafficPolicy", spec)
    assert message in problem.message


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("TrafficPolicy", {"targetRefs": [SERVICE]}),
        ("TrafficPolicy", {"rateLimit": {"requests": 1}}),
        ("TrafficPolicy", None),
        ("AuthorizationPolicy", None),
    ],
)
def test_half_a_policy_is_none(kind: str, spec: Any) -> None:
    if spec is not None:
        assert refusals(kind, spec) != []
    assert read(kind, spec) != []


@pytest.mark.parametrize("kind", BASES)
def test_a_rule_says_what_is_wrong(kind: str) -> None:
    """... in a message of its own: Kubernetes would show the expression."""

    def rules(schema: dict[str, Any]) -> list[dict[str, str]]:
        found = list(schema.get("x-kubernetes-validations", []))
        inner = [*schema.get("properties", {}).values(), schema.get("items"), None]
        return found + [rule for one in inner if one for rule in rules(one)]

    found = rules(schema_of(kind))
    assert found
    assert all(rule["message"] for rule in found)


@pytest.mark.parametrize("kind", BASES)
def test_what_is_told_fits_the_status(kind: str) -> None:
    """... of the API server, too, which prunes what it does not know."""
    spec = spec_of(kind, "targetRefs", [SERVICE, {"kind": "Service", "name": "none"}])
    everywhere = {"action": "ALLOW"} if kind == "AuthorizationPolicy" else {"targetRefs": "odd"}
    for content in (spec, everywhere):
        (status,) = (s for s in ingested(kind, content)[0].statuses if s.kind == kind)
        alone = Replica("replica", lambda _: False)
        changes = patch({}, status, "2026-01-01T00:00:00Z", alone)
        assert changes
        assert refusals(kind, changes, "status") == []


@pytest.mark.parametrize("path", sorted(CRDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_they_are_what_kubernetes_calls_definitions(path: Path) -> None:
    kubernetes_validate.validate(yaml.safe_load(path.read_text()), "1.30", strict=True)
