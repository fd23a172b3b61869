"""Whatever the objects say: no exception, clear lines, and a mesh that every sidecar can be served
from."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ingest import ALL, DOCUMENTS, NODE
from test_ingest_harm import essence
from xds_server.errors import Problem
from xds_server.ingest import Ingester, ingest
from xds_server.ir import Mesh, NodeId
from xds_server.lineage import Lineage
from xds_server.sources.files import parse
from xds_server.sources.objects import KubeObject

GOLDEN = Path(__file__).parents[2] / "golden" / "xds"
GOOD = [KubeObject("f", yaml.safe_load(text)) for text in ALL.values()]

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70000)
    | st.sampled_from([1 << 63, -(1 << 64), 1 << 10000])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["web", "demo", "10.96.77.1", "GET", "/a", "*", "Service", "", "1s", "\0", "\ud800"]
    )
    | st.sampled_from(["ExternalName", "None", "a.test", "ClientIP", ".", "far/*", "registry-only"])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "port", "value", "type", "annotations", "redirector.io/imports"]
            )
            | _SCALARS,
            inner,
        )
    ),
    max_leaves=6,
)
_ANY_TIME = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def mangle(draw: st.DrawFn, place: Any) -> None:
    """Replaces one value somewhere in it."""
    while keys := list(place) if isinstance(place, dict) else list(range(len(place))):
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or draw(st.integers(0, 5)) == 0:
            place[key] = draw(_VALUES)
            return
        place = place[key]


@st.composite
def mangled(draw: st.DrawFn) -> tuple[list[KubeObject], list[KubeObject]]:
    """Real objects, and the same with a few values replaced, at any depth."""
    good = draw(st.lists(st.sampled_from(DOCUMENTS), min_size=1, max_size=5))
    bad = deepcopy(good)
    for _ in range(draw(st.integers(0, 3))):
        mangle(draw, draw(st.sampled_from(bad)))
    return [KubeObject("f", one) for one in good], [KubeObject("f", one) for one in bad]


def fine(mesh: Mesh, problems: list[Problem], lineage: Lineage) -> None:
    """Every line is one, and every sidecar's snapshot is made and whole."""
    for problem in problems:
        line = str(problem)
        assert line.startswith("f: ")
        assert line.isprintable()
        assert len(line) < 5000
    assert all(line.isprintable() for line in (*mesh.ignored, *mesh.kept, *mesh.left_out))
    generation = lineage.next(mesh)
    for name in mesh.workloads:
        generation.snapshot(NodeId("10.0.0.1", name.name, name.namespace))
    generation.snapshot(NODE)


@settings(_ANY_TIME, max_examples=200)
@given(mangled())
def test_whatever_is_read_it_can_be_served(both: tuple[list[KubeObject], list[KubeObject]]) -> None:
    good, bad = both
    ingester, lineage = Ingester(), Lineage()
    for objects in (good, bad, good):
        fine(*ingester.ingest(objects), lineage)
    fine(*ingest(bad), Lineage())


@settings(_ANY_TIME, max_examples=150)
@given(st.data())
def test_a_bad_object_changes_nothing(data: st.DataObject) -> None:
    """... beyond what is said of it, when it was good before."""
    ingester = Ingester()
    before, problems = ingester.ingest(GOOD)
    assert problems == []
    which = data.draw(st.integers(0, len(GOOD) - 1))
    spoilt = deepcopy(GOOD[which].data)
    identity = {"apiVersion": spoilt["apiVersion"], "kind": spoilt["kind"]}
    name = {key: spoilt["metadata"][key] for key in ("name", "namespace")}  # type: ignore[index]
    data.draw(st.composite(lambda draw: mangle(draw, spoilt))())
    spoilt |= identity
    if isinstance(spoilt.get("metadata"), dict):
        spoilt["metadata"] |= name  # type: ignore[operator]
    else:
        spoilt["metadata"] = name
    objects = [*GOOD[:which], KubeObject("f", spoilt), *GOOD[which + 1 :]]
    mesh, problems = ingester.ingest(objects)
    kind = str(identity["kind"])
    subjects = {problem.object for problem in problems if problem.own}
    assert subjects <= {f"{kind} {name['namespace']}/{name['name']}"}
    if mesh.kept:
        assert set(mesh.kept) == subjects
        assert essence(mesh) == essence(before)
        assert mesh.left_out == mesh.closed == ()


@settings(_ANY_TIME, max_examples=100)
@given(st.dictionaries(st.sampled_from(["apiVersion", "kind", "metadata", "spec"]), _VALUES))
def test_anything_at_all_is_read(data: dict[str, Any]) -> None:
    fine(*ingest([KubeObject("f", data)]), Lineage())


TEXTS = [path.read_text() for path in sorted(GOLDEN.glob("*.in.yaml"))]


@settings(_ANY_TIME, max_examples=100)
@given(st.data())
def test_any_text_is_read(data: st.DataObject) -> None:
    """Real manifests with pieces taken out, put in, or moved."""
    text = data.draw(st.sampled_from(TEXTS))[:4000]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        piece = data.draw(
            st.text(max_size=4)
            | st.sampled_from(
                ["\n---\n", "{", "- ", "&a ", "*a", "<<: *a", "!!set ", "? ", "0x" * 9]
            )
        )
        text = text[:start] + piece + text[end:]
    objects, problems = parse("f", text)
    mesh, more = ingest(objects)
    fine(mesh, [*problems, *more], Lineage())


def _service(**spec: object) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(ALL["Service"])
    data["spec"] |= spec
    return data


def _route(**rule: object) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(ALL["HTTPRoute"])
    data["spec"]["rules"][0] |= rule
    return data


def _deep() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(100_000):
        inner = {"a": inner}
    return inner


def _expressions(text: str) -> list[dict[str, Any]]:
    return [{"path": {"type": "RegularExpression", "value": text}}] * 100


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_service(selector=_deep()), id="deep"),
        pytest.param(_service(ports=_deep()), id="deep, reported"),
        pytest.param(
            _service(ports=[{"name": f"p{n}", "port": n} for n in range(1, 20000)]), id="ports"
        ),
        pytest.param(_service(ports=[{"port": 1 << 100_000}]), id="number"),
        pytest.param(_service(clusterIP="1" * 5_000_000), id="address"),
        pytest.param(_service(**{"\x1b[2J" * 500_000: 1}), id="key"),
        pytest.param(_route(**{"x" * 5_000_000: 1}), id="long key"),
        pytest.param(_route(matches=_expressions("(" * 500 + ")" * 500)), id="groups"),
        pytest.param(_route(matches=_expressions("[[:" * 341)), id="classes"),
        pytest.param(_route(matches=_expressions("(a*)*" * 100)), id="repeats"),
        pytest.param({"apiVersion": "v1", "kind": "K" * 5_000_000}, id="kind"),
        pytest.param(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "n" * 5_000_000}}, id="name"
        ),
    ],
)
def test_large_values_cost_little(data: dict[str, Any]) -> None:
    """All of them take below a second. What grows faster than its input would take minutes."""
    fine(*ingest([KubeObject("f", data)]), Lineage())
