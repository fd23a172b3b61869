"""Whatever routes say that is read without complaint, a real Envoy takes what comes of it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from envoy_static import as_json, bootstrap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xds_server.ingest import ingest
from xds_server.ir import NodeId
from xds_server.sources.objects import KubeObject
from xds_server.translate import translate

from redirector.machine import envoy_binary

GATEWAY = "gateway.networking.k8s.io/v1"
NODE = NodeId("10.77.0.10", "client", "demo")


def _core(kind: str, name: str, **parts: Any) -> KubeObject:
    metadata = {"name": name, "namespace": "demo"}
    return KubeObject("f", {"apiVersion": "v1", "kind": kind, "metadata": metadata, **parts})


def _service(name: str, address: str, *ports: int) -> KubeObject:
    listed = [{"name": f"p{port}", "port": port} for port in ports]
    return _core("Service", name, spec={"clusterIP": address, "ports": listed})


OBJECTS = [
    _core("Pod", "client", status={"podIP": "10.77.0.10"}),
    _service("web", "10.96.0.1", 80, 8080),
    _service("back", "None", 80, 81),
    _core("Service", "outside", spec={"type": "ExternalName", "externalName": "x.example.com"}),
]
PATHS = st.sampled_from(["/", "/a", "/a/", "/a.b/c", "/%20", "/~!$&'()*+,;=:@", "/%2E/(a)"])
NEW_PATHS = PATHS | st.sampled_from(["", "x", "//"])
HOSTS = st.sampled_from(["a.example.com", "x", "1a.b", "localhost", f"{'a' * 63}.com"])
NAMES = st.sampled_from(
    ["x", "X-Y", "x_y", "cookie", "te", "connection", "content-length", "!#$%&'*+-.^`|~"]
)
VALUES = st.sampled_from(["x", "", "é", "100%", "%REQ(x)%", "a,b", '"', "\\1", "x" * 4096])
EXPRESSIONS = st.sampled_from([".*", "/a.*", "(?i)/x", "[^/]+", "(a|b)*c", "\\d+", "/(?P<n>x)"])
DURATIONS = st.sampled_from(["0s", "1ms", "500ms", "10s", "99999h99999h99999h99999h"])
GRPC_NAMES = st.sampled_from(["a_B", "_x", "Say"])


def _maybe(**parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=parts)


def _list(entries: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(entries, max_size=most)


def _typed(kind: str, **parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"type": st.just(kind), **parts})


REFERENCES = st.fixed_dictionaries(
    {"name": st.sampled_from(["web", "back", "outside", "gone"]), "port": st.sampled_from([80, 81])}
)
CHANGES = _maybe(
    set=_list(st.fixed_dictionaries({"name": NAMES, "value": VALUES})),
    add=_list(st.fixed_dictionaries({"name": NAMES, "value": VALUES})),
    remove=_list(NAMES),
)
NEW_PATH = _typed("ReplaceFullPath", replaceFullPath=NEW_PATHS) | _typed(
    "ReplacePrefixMatch", replacePrefixMatch=NEW_PATHS
)
FRACTION = st.fixed_dictionaries(
    {"numerator": st.integers(0, 3), "denominator": st.integers(3, 2**31 - 1)}
)
MIRROR = st.fixed_dictionaries(
    {"backendRef": REFERENCES}, optional={"fraction": FRACTION}
) | st.fixed_dictionaries({"backendRef": REFERENCES, "percent": st.integers(0, 100)})
COMMON_FILTERS = (
    _typed("RequestHeaderModifier", requestHeaderModifier=CHANGES)
    | _typed("ResponseHeaderModifier", responseHeaderModifier=CHANGES)
    | _typed("RequestMirror", requestMirror=MIRROR)
)
HTTP_FILTERS = (
    COMMON_FILTERS
    | _typed("URLRewrite", urlRewrite=_maybe(hostname=HOSTS, path=NEW_PATH))
    | _typed(
        "RequestRedirect",
        requestRedirect=_maybe(
            scheme=st.sampled_from(["http", "https"]),
            hostname=HOSTS,
            port=st.sampled_from([1, 80, 443, 65535]),
            path=NEW_PATH,
            statusCode=st.sampled_from([301, 302, 303, 307, 308]),
        ),
    )
)
VALUE_MATCHES = st.fixed_dictionaries({"name": NAMES, "value": VALUES}) | _typed(
    "RegularExpression", name=NAMES, value=EXPRESSIONS
)
HTTP_MATCHES = _maybe(
    path=_typed("Exact", value=PATHS)
    | _typed("PathPrefix", value=PATHS)
    | _typed("RegularExpression", value=EXPRESSIONS),
    headers=_list(VALUE_MATCHES),
    queryParams=_list(VALUE_MATCHES),
    method=st.sampled_from(["GET", "CONNECT", "TRACE"]),
)
GRPC_MATCHES = _maybe(
    method=_typed("Exact", service=GRPC_NAMES, method=GRPC_NAMES)
    | _typed("Exact", method=GRPC_NAMES)
    | _typed("RegularExpression", service=EXPRESSIONS),
    headers=_list(VALUE_MATCHES),
)
RETRY = _maybe(attempts=st.sampled_from([0, 1, 100]), codes=st.just([500, 429]), backoff=DURATIONS)


def _backends(filters: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    more = _maybe(weight=st.sampled_from([0, 1, 7, 1_000_000]), filters=_list(filters, 2))
    return _list(st.builds(lambda one, other: one | other, REFERENCES, more), 4)


HTTP_RULES = _maybe(
    matches=_list(HTTP_MATCHES),
    filters=_list(HTTP_FILTERS),
    backendRefs=_backends(HTTP_FILTERS),
    retry=RETRY,
    timeouts=_maybe(request=DURATIONS, backendRequest=DURATIONS),
)
GRPC_RULES = _maybe(
    matches=_list(GRPC_MATCHES),
    filters=_list(COMMON_FILTERS),
    backendRefs=_backends(COMMON_FILTERS),
)


def _route(kind: str, port: int, number: int, rules: list[Any]) -> KubeObject:
    parent = {"group": "", "kind": "Service", "name": "web", "port": port}
    metadata = {"name": f"r{number}", "namespace": "demo"}
    spec = {"parentRefs": [parent], "rules": rules}
    return KubeObject(
        "f", {"apiVersion": GATEWAY, "kind": kind, "metadata": metadata, "spec": spec}
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("envoy") / "bootstrap.json"


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(HTTP_RULES, min_size=1, max_size=12), st.lists(GRPC_RULES, max_size=8))
def test_envoy_takes_what_was_read(file: Path, http: list[Any], grpc: list[Any]) -> None:
    """Rules are routes of their own here, so that a bad one costs no other."""
    routes = [_route("HTTPRoute", 80, number, [rule]) for number, rule in enumerate(http)]
    routes += [_route("GRPCRoute", 8080, number, [rule]) for number, rule in enumerate(grpc)]
    mesh, _ = ingest([*OBJECTS, *routes])
    file.write_text(as_json(bootstrap(translate(mesh, NODE))))
    command = [str(envoy_binary()), "--mode", "validate", "-c", str(file), "-l", "error"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
