"""What is kept from one state of the mesh to the next, and that it is never the wrong thing."""

import weakref
from dataclasses import replace
from ipaddress import ip_address

from xds_server.generation import Generation
from xds_server.ir import (
    Action,
    AppPort,
    Endpoint,
    Mesh,
    Name,
    NodeId,
    Policy,
    PolicyRule,
    Protocol,
    Service,
    ServicePort,
    Workload,
)
from xds_server.lineage import Lineage
from xds_server.memo import Memo
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE
from xds_server.snapshot import Snapshot
from xds_server.translate import translate

SERVICES, PODS = 20, 30


def service(number: int, address: str = "10.1.0.1") -> Service:
    port = ServicePort(80, Protocol.HTTP, (Endpoint(ip_address(address), 8080),))
    return Service(Name("demo", f"s{number}"), (ip_address(f"10.0.0.{number}"),), (port,))


def policy(*pods: int, rules: int = 1) -> Policy:
    targets = frozenset(Name("demo", f"p{number}") for number in pods)
    return Policy(Name("demo", "closed"), Action.DENY, targets, (PolicyRule(),) * rules)


PORTS = (AppPort(8080, Protocol.HTTP),)
MESH = Mesh(
    services={s.name: s for s in map(service, range(SERVICES))},
    workloads={
        name: Workload(name, (), PORTS) for name in (Name("demo", f"p{n}") for n in range(PODS))
    },
    policies=(policy(1, 2),),
)
NODES = [NodeId("10.2.0.1", f"p{number}", "demo") for number in range(PODS)]


def prepared(lineage: Lineage, mesh: Mesh) -> Generation:
    generation = lineage.next(mesh)
    generation.prepare(NODES)
    return generation


def shared(old: Snapshot | None, new: Snapshot | None) -> set[str]:
    """Types whose set is the very same in both."""
    assert old is not None
    assert new is not None
    return {url for url in new.types if old.of(url) is new.of(url)}


def test_the_same_mesh_again_costs_nothing() -> None:
    lineage = Lineage()
    first = prepared(lineage, MESH)
    again = prepared(lineage, Mesh(MESH.services, MESH.workloads, (), MESH.policies))
    assert (lineage.translated, again.encodings) == (0, 0)
    for node in NODES:
        assert again.ready(node) is first.ready(node)


def test_a_changed_endpoint_is_one_translation_and_one_encoding_for_all() -> None:
    lineage = Lineage()
    first = prepared(lineage, MESH)
    moved = service(3, "10.1.0.9")
    mesh = replace(MESH, services={**MESH.services, moved.name: moved})
    second = prepared(lineage, mesh)
    assert second.encodings == 1
    for node in NODES:
        assert shared(first.ready(node), second.ready(node)) == {CLUSTER, LISTENER, ROUTE, FILTER}
    # The service without its endpoints, its endpoints, all of them, and a whole for each of the
    # two kinds of pod: however many pods and services there are.
    assert lineage.translated < 10


def test_an_edited_policy_translates_what_comes_in_to_its_pods() -> None:
    lineage = Lineage()
    first = prepared(lineage, MESH)
    second = prepared(lineage, replace(MESH, policies=(policy(1, 2, rules=2),)))
    changed = [n for n in NODES if second.ready(n) is not first.ready(n)]
    assert changed == [NODES[1], NODES[2]]
    # Listener, routes and filters of these two, the set that they are in, and the whole.
    assert lineage.translated <= 4
    assert second.encodings <= 4


def test_what_is_carried_over_is_what_would_be_made_anew() -> None:
    lineage = Lineage()
    moved, tcp = service(3, "10.1.0.9"), service(4)
    tcp = replace(tcp, ports=(replace(tcp.ports[0], protocol=Protocol.TCP),))
    states = [
        MESH,
        replace(MESH, services={**MESH.services, moved.name: moved}),
        replace(MESH, services={**MESH.services, tcp.name: tcp}, policies=()),
        replace(MESH, services={moved.name: moved}, policies=(policy(5),)),
        replace(MESH, workloads={}),
        MESH,
    ]
    for mesh in states:
        prepared(lineage, mesh)
        for node in (NODES[1], NODES[5], NodeId("10.2.0.1", "unknown", "elsewhere")):
            found = lineage.next(mesh).snapshot(node)
            wanted = Generation(lambda node, mesh=mesh: translate(mesh, node)).snapshot(node)
            for url in (CLUSTER, ENDPOINT, LISTENER, ROUTE, FILTER):
                assert found.of(url).version == wanted.of(url).version
                assert list(found.of(url)) == list(wanted.of(url))


def test_a_state_long_ago_is_carried_through_states_that_did_not_look_at_it() -> None:
    """What stands behind a result that is found again is not asked for, but is not lost either."""
    lineage = Lineage()
    prepared(lineage, MESH)
    for number in (3, 4, 5):
        moved = service(number, "10.1.0.9")
        made = prepared(lineage, replace(MESH, services={**MESH.services, moved.name: moved}))
        assert made.encodings <= 2, "the one that moved, and the one that moved back"
        assert lineage.translated < 10


def test_a_memo_forgets_what_nobody_asks_for_any_more() -> None:
    class Thing:
        pass

    def inner(thing: Thing) -> list[Thing]:
        return [thing]

    def outer(thing: Thing) -> list[list[Thing]]:
        return [memo(inner, thing)]

    memo, lasting = Memo(), Thing()
    held = memo(outer, lasting)
    passing: list[weakref.ref[Thing]] = []
    for _ in range(5):
        things = [Thing() for _ in range(1000)]
        for thing in things:
            memo(inner, thing)
        passing += map(weakref.ref, things)
        del things, thing
        memo = Memo(memo)
        assert memo(outer, lasting) is held
    assert memo(inner, lasting) is held[0], "it was in use all the time"
    assert sum(thing() is not None for thing in passing) <= 1000, "those of the last but one"


def test_equal_arguments_are_not_the_same_but_their_value_is() -> None:
    memo = Memo()
    one, other = [1], [1]
    assert memo(len, one) == memo(len, other) == 1
    assert memo.made["len"] == 2
    assert memo.value((1, 2)) is memo.value(tuple(iter((1, 2))))
    assert memo.row([one, other]) is memo.row([one, other])
    assert memo.row([one]) is not memo.row([other])
