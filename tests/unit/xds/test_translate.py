"""What holds for every translation; what it looks like is in the golden files."""

import json
import random
import re
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest
from envoy_static import HCM, as_json
from xds_server.ingest import ingest
from xds_server.ir import (
    Action,
    HeaderChange,
    Mesh,
    Name,
    NodeId,
    Policy,
    PolicyRule,
    Source,
)
from xds_server.sources.files import parse
from xds_server.sources.objects import KubeObject
from xds_server.translate import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE, Resources, translate

from redirector.errors import InputError

ROOT = Path(__file__).parents[3]
GOLDEN = sorted((ROOT / "tests" / "golden" / "xds").glob("*.in.yaml"))
CLIENT = NodeId("10.77.0.10", "client", "demo")
WEB_V1 = NodeId("10.77.0.11", "web-v1", "demo")
WEB_V2 = NodeId("10.77.0.12", "web-v2", "demo")


def demo() -> list[KubeObject]:
    files = sorted((ROOT / "manifests" / "demo").iterdir())
    return [found for file in files for found in parse(file.name, file.read_text())[0]]


def mesh_of(objects: list[KubeObject]) -> Mesh:
    mesh, problems = ingest(objects)
    assert problems == []
    return mesh


def content(resources: Resources) -> list[tuple[str, str, bytes]]:
    return [
        (url, name, message.SerializeToString(deterministic=True))
        for url, named in resources.items()
        for name, message in named.items()
    ]


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.name)
def test_the_order_of_objects_does_not_matter(file: Path) -> None:
    objects, _ = parse(file.name, file.read_text())
    node = NodeId.parse(file.read_text().splitlines()[0].removeprefix("# node: "))
    mesh, problems = ingest(objects)
    expected = content(translate(mesh, node))
    for seed in range(5):
        shuffled = random.Random(seed).sample(objects, len(objects))
        again, wrong = ingest(shuffled)
        # Of two objects that exclude each other it is the second one that is named.
        assert bool(wrong) == bool(problems)
        if not problems:
            assert content(translate(again, node)) == expected


def test_resources_are_sorted() -> None:
    for named in translate(mesh_of(demo()), WEB_V1).values():
        assert list(named) == sorted(named)


def test_sidecars_share_messages() -> None:
    mesh = mesh_of(demo())
    one, two, other = (translate(mesh, node) for node in (WEB_V1, WEB_V2, CLIENT))
    for url in (CLUSTER, ENDPOINT):
        assert all(one[url][name] is other[url][name] for name in one[url])
    assert one[LISTENER]["outbound"] is other[LISTENER]["outbound"]
    # Two pods of one kind have the same ports and policies.
    assert one[LISTENER]["inbound"] is two[LISTENER]["inbound"]
    assert one[ROUTE]["inbound"] is two[ROUTE]["inbound"]
    assert not any(name.startswith("inbound") for name in other[ROUTE])


def test_all_that_is_named_is_there() -> None:
    for node in (CLIENT, WEB_V1, NodeId("10.77.0.99", "stranger", "demo")):
        resources = translate(mesh_of(demo()), node)
        assert set(resources) == {CLUSTER, ENDPOINT, LISTENER, ROUTE, FILTER}
        named, filters = set(), set()
        for listener in resources[LISTENER].values():
            chains = [*listener.filter_chains, listener.default_filter_chain]  # type: ignore[attr-defined]
            for chain in chains:
                for part in chain.filters:
                    if part.HasField("config_discovery"):
                        filters.add(part.name)
                    if part.typed_config.Is(HCM.DESCRIPTOR):
                        manager = HCM()
                        part.typed_config.Unpack(manager)
                        named.add(manager.rds.route_config_name)
        assert named == set(resources[ROUTE])
        assert filters == set(resources[FILTER])
        eds = {
            name
            for name, cluster in resources[CLUSTER].items()
            if json.loads(as_json(cluster))["type"] == "EDS"
        }
        assert eds == set(resources[ENDPOINT])


@pytest.mark.parametrize(
    ("text", "node"),
    [
        (
            "sidecar~10.0.0.1~web-v1.demo~demo.svc.cluster.local",
            NodeId("10.0.0.1", "web-v1", "demo"),
        ),
        ("sidecar~fd00:0::1~a.b.c~c.svc.example.org", NodeId("fd00::1", "a.b", "c")),
    ],
)
def test_node_id(text: str, node: NodeId) -> None:
    assert NodeId.parse(text) == node


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sidecar",
        "router~10.0.0.1~web.demo~demo.svc.cluster.local",
        "sidecar~10.0.0~web.demo~demo.svc.cluster.local",
        "sidecar~10.0.0.1~web~demo.svc.cluster.local",
        "sidecar~10.0.0.1~web.demo~other.svc.cluster.local",
        "sidecar~10.0.0.1~web.demo~demo.svc.cluster.local~",
        # What would move a terminal's cursor or fill a log.
        "sidecar~10.0.0.1~web\x1b[2J.demo~demo.svc.cluster.local",
        "sidecar~10.0.0.1~web\nweb.demo~demo.svc.cluster.local",
        "sidecar~10.0.0.1~web.de mo~de mo.svc.cluster.local",
        "sidecar~fe80::1%\x1b[2J~web.demo~demo.svc.cluster.local",
        f"sidecar~10.0.0.1~{'w' * 254}.demo~demo.svc.cluster.local",
        "x" * 100_000,
    ],
)
def test_what_is_not_a_node_id(text: str) -> None:
    with pytest.raises(
        InputError, match=r"node id .* must look like 'sidecar~10\.0\.0\.1~POD"
    ) as found:
        NodeId.parse(text)
    assert len(str(found.value)) < 400


def test_header_changes_one_after_the_other() -> None:
    rule = HeaderChange(
        set=(("A", "1"), ("b", "1"), ("c", "1")), add=(("d", "1"), ("E", "1")), remove=("f",)
    )
    backend = HeaderChange(
        set=(("a", "2"), ("f", "2")), add=(("c", "2"), ("d", "2")), remove=("e",)
    )
    assert rule.then(backend) == HeaderChange(
        set=(("b", "1"), ("c", "1"), ("a", "2"), ("f", "2")),
        add=(("d", "1"), ("c", "2"), ("d", "2")),
        remove=("f", "e"),
    )
    assert not HeaderChange().then(HeaderChange())


@pytest.mark.parametrize(
    ("targets", "refused"),
    [
        (None, False),
        (frozenset({Name("demo", "web-v1")}), True),
        # It names nobody that is known yet.
        (frozenset(), True),
    ],
)
def test_a_pod_that_nobody_knows_is_closed_where_policies_choose_pods(
    targets: frozenset[Name] | None, refused: bool
) -> None:
    """Its policies would come a moment after its sidecar."""
    mesh = Mesh(policies=(Policy(Name("demo", "some"), Action.ALLOW, targets, ()),))
    rules = as_json(translate(mesh, CLIENT)[FILTER]["connections.deny"])
    assert ("demo/(unknown pod)" in rules) == refused
    elsewhere = NodeId("10.77.0.10", "client", "other")
    assert "(unknown pod)" not in as_json(translate(mesh, elsewhere)[FILTER]["connections.deny"])


def test_only_an_edited_policy_replaces_the_chain_of_open_connections() -> None:
    """Pods that come and go change the addresses in its rules, which come by themselves."""
    peers = [Source((tuple(map(ip_network, found)),)) for found in (["10.1.0.1"], ["10.1.0.2"])]
    first, moved = (
        Policy(Name("demo", "some"), Action.ALLOW, None, (PolicyRule((peer,)),), "form")
        for peer in peers
    )
    edited = replace(first, form="other")
    before, after, other = (translate(Mesh(policies=(p,)), CLIENT) for p in (first, moved, edited))
    assert before[FILTER] != after[FILTER]
    assert before[LISTENER] == after[LISTENER]
    assert before[LISTENER]["inbound"] != other[LISTENER]["inbound"]


def test_a_local_service_is_another_one_on_each_node_and_all_else_is_shared() -> None:
    text = "\n---\n".join(
        f"{{apiVersion: v1, kind: Pod, metadata: {{name: p{number}, namespace: demo}}, "
        f"spec: {{nodeName: {node}}}, status: {{podIP: 10.77.3.{number}}}}}"
        for number, node in enumerate(("node-1", "node-2", "node-2", "node-3", "node-4", '""'))
    )
    objects, _ = parse("f", (GOLDEN[0].parent / "services.in.yaml").read_text())
    mesh, _ = ingest([*objects, *parse("g", text)[0]])
    found = [
        translate(mesh, NodeId(f"10.77.3.{number}", f"p{number}", "demo")) for number in range(6)
    ]
    local = [
        re.findall(r"10\.77\.0\.\d+", as_json(r[ENDPOINT]["outbound|80|local.demo"])) for r in found
    ]
    assert local == [["10.77.0.72"], ["10.77.0.71"], ["10.77.0.71"], [], [], []]
    assert found[1][ENDPOINT] is found[2][ENDPOINT]
    # Nothing is for these two.
    assert found[4][ENDPOINT] is found[5][ENDPOINT]
    assert len({id(r[CLUSTER]) for r in found}) == 1
