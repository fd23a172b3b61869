"""Ingesting again costs what has changed, and finds what ingesting anew would find."""

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from xds_server.bench.objects import Size, World
from xds_server.ingest import Ingester
from xds_server.ir import Mesh
from xds_server.sources.files import parse
from xds_server.sources.objects import KubeObject

POLICY = {"apiVersion": "policy.redirector.io/v1alpha1", "kind": "AuthorizationPolicy"}
GOLDEN = sorted(Path(__file__).parents[2].glob("golden/xds/*.in.yaml"))


def objects(path: Path) -> list[KubeObject]:
    return parse(path.name, path.read_text())[0]


def same(one: Mesh, other: Mesh) -> bool:
    return all(getattr(one, f.name) == getattr(other, f.name) for f in fields(Mesh))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_the_same_objects_again_are_the_same_mesh_with_the_same_problems(path: Path) -> None:
    ingester, found = Ingester(), objects(path)
    mesh, problems = ingester.ingest(found)
    for _ in range(3):
        again, still = ingester.ingest(found)
        assert same(mesh, again)
        assert still == problems


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_objects_that_come_and_go_leave_nothing_behind(path: Path) -> None:
    ingester, found = Ingester(), objects(path)
    ingester.ingest(found)
    for number in range(0, len(found), len(found) // 4 + 1):
        fewer = found[:number] + found[number + 1 :]
        mesh, problems = ingester.ingest(fewer)
        wanted, expected = Ingester().ingest(fewer)
        # What is bad now and was good before stays in force: that is its own matter.
        assert mesh.kept or (same(mesh, wanted) and problems == expected)


def test_one_changed_object_is_read_and_no_other() -> None:
    world = World(Size(50, 20, 30))
    ingester = Ingester()
    ingester.ingest(world.objects())
    made = ingester.made
    assert (made["read_pod"], made["read_service"], made["read_slice"]) == (50, 20, 20)
    world.move_endpoint()
    ingester.ingest(world.objects())
    work = {name for name in ingester.made if not name.startswith("_")}
    assert work == {"read_slice", "build_service"}
    assert (ingester.made["read_slice"], ingester.made["build_service"]) == (1, 1)
    world.edit_policy()
    ingester.ingest(world.objects())
    work = {name for name in ingester.made if not name.startswith("_")}
    assert work == {"read", "services_aimed_at"}


def test_what_is_wrong_among_many_is_told_for_as_long_as_it_is() -> None:
    many = World(Size(100, 3, 200)).objects()
    first = many[0].data
    meta = {"name": "other", "namespace": "bench"}
    others = [
        KubeObject("twice", first),
        KubeObject("address", {**first, "metadata": meta}),
        KubeObject("nameless", {**first, "metadata": {}}),
        KubeObject("bad", {**first, "metadata": meta, "spec": {"containers": 1}}),
        KubeObject("foreign", {"apiVersion": "v1", "kind": "Secret", "metadata": meta}),
        KubeObject("misspelt", {**POLICY, "kind": "AuthorisationPolicy", "metadata": meta}),
    ]
    ingester = Ingester()
    ingester.ingest(many)
    for other in others:
        for there in (many, [*many, other], [other, *many], [*many[:50], other, *many[51:]]):
            mesh, problems = ingester.ingest(there)
            wanted, expected = Ingester().ingest(there)
            assert problems == expected
            assert mesh.kept or same(mesh, wanted)


def shuffled_world(choose: random.Random) -> dict[str, dict[str, Any]]:
    """Pods, Services and policies for them, by what changes one by one."""
    pod = {
        "kind": "Pod",
        "metadata": {"labels": {"app": choose.choice("ab"), "tier": choose.choice("xy")}},
        "spec": {
            "serviceAccountName": choose.choice(("one", "two")),
            "hostNetwork": choose.random() < 0.2,
        },
        "status": {"podIP": f"10.0.0.{choose.randint(1, 9)}"},
    }
    service = {
        "kind": "Service",
        "spec": {
            "clusterIP": f"10.1.0.{choose.randint(1, 99)}",
            "selector": {"app": choose.choice("ab")} if choose.random() < 0.9 else {"app": 1},
        },
    }
    references = [
        {"kind": choose.choice(("Service", "Pod")), "name": f"n{choose.randint(0, 3)}"}
        for _ in range(choose.randint(1, 2))
    ]
    policy = {
        "apiVersion": "policy.redirector.io/v1alpha1",
        "kind": "AuthorizationPolicy",
        "spec": {
            "action": choose.choice(("ALLOW", "DENY")),
            "rules": [
                {"from": [choose.choice(({"namespaces": ["s", "t"]}, {"namespaces": ["t"]}))]},
                {"from": [{"serviceAccounts": [choose.choice(("one", "t/two"))]}]},
            ],
            **choose.choice(
                (
                    {},
                    {"targetRefs": references},
                    {"selector": {"matchLabels": {"tier": choose.choice("xy")}}},
                )
            ),
        },
    }
    return {"pod": pod, "service": service, "policy": policy}


@pytest.mark.parametrize("seed", range(6))
def test_policies_hold_as_if_read_anew(seed: int) -> None:
    """... whoever came, went or changed since."""
    choose = random.Random(seed)
    ingester, there = Ingester(), dict[tuple[str, str, str], KubeObject]()
    for _ in range(80):
        kind = choose.choice(("pod", "pod", "service", "policy"))
        key = (kind, choose.choice("st"), f"n{choose.randint(0, 3)}")
        if choose.random() < 0.3 and kind != "service":
            there.pop(key, None)
        else:
            made = {"apiVersion": "v1", **shuffled_world(choose)[kind]}
            named = {**made.get("metadata", {}), "namespace": key[1], "name": key[2]}
            there[key] = KubeObject("f", {**made, "metadata": named})
        mesh, _ = ingester.ingest(list(there.values()))
        wanted, _ = Ingester().ingest(list(there.values()))
        # What is bad now and was good before stays in force: that is its own matter.
        assert mesh.kept or mesh.policies == wanted.policies
    assert mesh.policies


def test_a_pod_concerns_the_policies_that_meet_it() -> None:
    def pod(name: str, app: str, ip: str) -> KubeObject:
        return KubeObject(
            "f",
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": name[0], "labels": {"app": app}},
                "status": {"podIP": ip},
            },
        )

    def policy(number: int, source: str) -> KubeObject:
        return KubeObject(
            "f",
            {
                "apiVersion": "policy.redirector.io/v1alpha1",
                "kind": "AuthorizationPolicy",
                "metadata": {"name": f"p{number}", "namespace": "d"},
                "spec": {
                    "selector": {"matchLabels": {"app": f"a{number}"}},
                    "rules": [{"from": [{"namespaces": [source]}]}],
                },
            },
        )

    policies = [policy(number, "e" if number == 3 else "f") for number in range(50)]
    base = [pod("d1", "a1", "10.0.0.1"), pod("f1", "", "10.0.0.2")]
    ingester = Ingester()
    ingester.ingest([*policies, *base])
    assert ingester.made["read"] == 50
    for more, read in ((pod("d2", "a2", "10.0.0.3"), 1), (pod("e1", "", "10.0.0.4"), 1)):
        base.append(more)
        mesh, _ = ingester.ingest([*policies, *base])
        assert ingester.made["read"] == read
        assert mesh.policies == Ingester().ingest([*policies, *base])[0].policies
