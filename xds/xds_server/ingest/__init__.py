"""From Kubernetes objects to a Mesh: pure, and every mistake is collected.

A bad object harms only itself. While it is bad its last good form stays in force; one that never
was good is left out, but a policy, or what policies select by, refuses everything in its place.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from xds_server.conditions import ObjectStatus
from xds_server.errors import Problem
from xds_server.groups import GATEWAY_GROUP, POLICY_VERSION
from xds_server.ingest.attachment import Attached, attach, with_traffic
from xds_server.ingest.building import build_service, build_workload
from xds_server.ingest.core import Pod, RawPort, RawService, Slice, read_node
from xds_server.ingest.kinds import Sorted, sort_by_kind
from xds_server.ingest.lastgood import Forms, Key
from xds_server.ingest.lookup import Lookup, Origins
from xds_server.ingest.members import Members
from xds_server.ingest.places import Places, read_places
from xds_server.ingest.policies import PolicyReader
from xds_server.ingest.policy_status import policy_statuses
from xds_server.ingest.reader import Item
from xds_server.ingest.refusals import read_policies
from xds_server.ingest.route_status import judge, settle
from xds_server.ingest.routes import ROUTE_KINDS, Grant, RouteReader, read_grant
from xds_server.ingest.scopes import NOTHING, Wishes, read_namespace
from xds_server.ingest.traffic import read_traffic
from xds_server.ir import (
    Mesh,
    Name,
    Parent,
    Policy,
    Protocol,
    Route,
    Service,
    Workload,
    protocols_of,
)
from xds_server.memo import Memo
from xds_server.sources.objects import KubeObject

__all__ = ["Ingester", "ingest"]

_KINDS = {
    ("v1", "Namespace"),
    ("v1", "Node"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
    (f"{GATEWAY_GROUP}/v1", "GRPCRoute"),
    (f"{GATEWAY_GROUP}/v1", "HTTPRoute"),
    (f"{GATEWAY_GROUP}/v1beta1", "HTTPRoute"),
    (f"{GATEWAY_GROUP}/v1", "ReferenceGrant"),
    (f"{GATEWAY_GROUP}/v1beta1", "ReferenceGrant"),
    (POLICY_VERSION, "AuthorizationPolicy"),
    (POLICY_VERSION, "TrafficPolicy"),
}


def ingest(objects: Sequence[KubeObject]) -> tuple[Mesh, list[Problem]]:
    """The mesh that the objects describe, by themselves, and everything that is wrong with them."""
    return Ingester().ingest(objects)


class Ingester:
    """Ingests one state of the objects after the other, and remembers the last good form of every
    object that there is."""

    def __init__(self, defaults: Wishes = NOTHING) -> None:
        """`defaults` are for pods that wish nothing, nor do their namespaces."""
        self._defaults = defaults
        self._good: Mapping[Key, KubeObject] = {}
        self._memo = Memo()

    @property
    def made(self) -> Mapping[str, int]:
        """How often each function had to be called the last time."""
        return self._memo.made

    def ingest(
        self, objects: Sequence[KubeObject], suspects: Collection[str] = ()
    ) -> tuple[Mesh, list[Problem]]:
        """The mesh, and everything that is wrong. `suspects` are namespaces for which there may be
        policies in what nobody could read: everything is refused there.

        An object that is the very same as the last time (not an equal one) is not read again, and
        what did not change of the mesh is the same object again."""
        self._memo = Memo(self._memo)
        forms = Forms(self._good, memo=self._memo)
        found = sort_by_kind(objects, _KINDS, forms)
        mesh = _mesh(found, {*found.suspects, *suspects}, forms, self._defaults)
        self._good = forms.good
        # A field that is read twice is wrong only once.
        return mesh, list(dict.fromkeys([*found.problems, *forms.problems]))


def _mesh(found: Sorted, suspects: Collection[str], forms: Forms, defaults: Wishes) -> Mesh:
    kinds, memo = found.kinds, forms.memo
    places = read_places(kinds, forms)
    routes, route_statuses, foreign = _routes(kinds, places, forms)
    reached = _reached(places.services, routes, memo)
    protocols = memo(_protocols, reached, memo.value(protocols_of(routes)))
    attached = _attached(kinds, places, reached, protocols, routes, forms)
    found.problems.extend(attached.problems)
    wishes = {
        one.item.name.name: one.value.over(defaults)
        for one in forms.read_all(kinds["Namespace"], read_namespace)
    }
    nodes = forms.read_all(kinds["Node"], read_node)
    zones = frozenset((one.item.name.name, one.value) for one in nodes if one.good)
    policies, closed = _policies(kinds, places, suspects, forms)
    return Mesh(
        services=_services(reached, places, protocols, memo),
        workloads=memo(
            _workloads,
            places.all_pods,
            places.behind,
            protocols,
            memo.value(zones),
            memo.value(frozenset(wishes.items())),
            memo.value(defaults),
        ),
        routes=tuple(
            sorted(
                (memo(with_traffic, route, route.kind.value, attached) for route in routes),
                key=lambda route: (route.name, route.kind),
            )
        ),
        policies=tuple(sorted(policies, key=lambda policy: policy.name)),
        traffic=memo.by(
            (attach, attached), lambda: tuple(memo.value(policy) for policy in attached.policies)
        ),
        ignored=tuple(sorted([*found.ignored, *foreign])),
        kept=tuple(sorted(forms.kept)),
        left_out=tuple(sorted(set(forms.left_out) - set(closed))),
        closed=tuple(closed),
        statuses=(
            *policy_statuses(
                [*kinds["TrafficPolicy"], *kinds["AuthorizationPolicy"]],
                attached.statuses,
                forms.kept,
                {"Pod": places.pods, "Service": places.named},
            ),
            *route_statuses,
        ),
        registry_only=bool(defaults.closed),
        registry_only_in={name: bool(wish.closed) for name, wish in sorted(wishes.items())},
    )


def _routes(
    kinds: Mapping[str, Sequence[Item]], places: Places, forms: Forms
) -> tuple[list[Route], list[ObjectStatus], list[str]]:
    """The routes in force, the status of all, and what is of no use here."""
    grants: list[Grant] = []
    for granted in forms.read_all(kinds["ReferenceGrant"], read_grant):
        grants += granted.value if granted.good else []
    reader = RouteReader(places.services, grants)
    beside = (places.all_services, forms.memo.value(tuple(grants)))
    judged, foreign = [], []
    for item in (item for kind in ROUTE_KINDS for item in kinds[kind]):
        one = judge(item, reader, forms, beside)
        if one is None:
            foreign.append(f"{item.subject} (no parent is a Service: kind Service of group '')")
        else:
            judged.append(one)
    foreign += (
        f"{raw.item.subject}: {said} (served as TCP)"
        for raw in places.services.values()
        for said in raw.foreign
    )
    return *settle(judged, forms.memo), foreign


def _reached(
    services: Mapping[Name, RawService], routes: Iterable[Route], memo: Memo
) -> tuple[RawService, ...]:
    """The Services, of which those by name have the ports that routes want of them."""
    wanted: dict[Name, set[int]] = defaultdict(set)
    for route in routes:
        for rule in route.rules:
            for name, number in rule.destinations:
                wanted[name].add(number)
    return memo.row(
        memo(RawService.reached_at, raw, memo.row(sorted(wanted[name]))) if raw.external else raw
        for name, raw in services.items()
    )


def _attached(
    kinds: Mapping[str, Sequence[Item]],
    places: Places,
    reached: tuple[RawService, ...],
    protocols: Mapping[RawPort, Protocol],
    routes: Iterable[Route],
    forms: Forms,
) -> Attached:
    """The TrafficPolicies, where they hold."""
    readings = forms.read_all(kinds["TrafficPolicy"], read_traffic)
    rules = frozenset(
        (route.kind.value, route.name, name)
        for route in routes
        for name in ("", *(rule.name for rule in route.rules))
    )
    memo = forms.memo
    good = memo.row(one.value for one in readings if one.good)
    return memo(attach, good, reached, protocols, places.behind, memo.value(rules))


def _policies(
    kinds: Mapping[str, Sequence[Item]], places: Places, suspects: Collection[str], forms: Forms
) -> tuple[list[Policy], list[str]]:
    """The AuthorizationPolicies, and in whose place everything is refused."""
    memo = forms.memo
    origins = memo(Origins, places.all_pods, memo.value(places.contested.pods))
    lookup = Lookup(places.all_pods, places.named, places.vague, places.behind, origins, memo)
    return read_policies(
        kinds["AuthorizationPolicy"],
        PolicyReader(lookup),
        forms,
        places.opaque,
        suspects,
    )


def _services(
    reached: tuple[RawService, ...],
    places: Places,
    protocols: Mapping[RawPort, Protocol],
    memo: Memo,
) -> Mapping[Name, Service]:
    by_name = {raw.name: raw for raw in reached}
    return {
        name: _service(by_name[name], places.pieces.get(name, []), protocols, memo)
        for name in memo(_names, reached)
    }


def _service(
    raw: RawService, pieces: Sequence[Slice], protocols: Mapping[RawPort, Protocol], memo: Memo
) -> Service:
    spoken = [protocols[port] for port in raw.ports]
    return memo.by(
        (build_service, raw, memo.row(pieces), *spoken),
        lambda: build_service(raw, pieces, protocols),
    )


def _names(objects: tuple[Pod | RawService, ...]) -> list[Name]:
    return sorted(one.name for one in objects)


def _workloads(
    pods: tuple[Pod, ...],
    members: Members,
    protocols: Mapping[RawPort, Protocol],
    zones: Collection[tuple[str, str]],
    wishes: Collection[tuple[str, Wishes]],
    defaults: Wishes,
) -> Mapping[Name, Workload]:
    """`zones` are those of the nodes, `wishes` those of the namespaces, by name."""
    nodes, wished = dict(zones), dict(wishes)
    by_name = {pod.name: pod for pod in pods}
    return {
        name: build_workload(
            pod,
            members.ports.get(name, ()),
            protocols,
            pod.zone or nodes.get(pod.node) or members.zones.get(name, ""),
            pod.wishes.over(wished.get(name.namespace, defaults)),
        )
        for name, pod in sorted(by_name.items())
    }


def _protocols(
    services: tuple[RawService, ...], routed: Collection[tuple[Parent, Protocol]]
) -> Mapping[RawPort, Protocol]:
    """`routed` is what routes say of ports that say nothing themselves."""
    said = dict(routed)
    return {
        port: port.declared or said.get(Parent(service.name, port.number), Protocol.TCP)
        for service in services
        for port in service.ports
    }
