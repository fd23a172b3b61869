"""From Kubernetes objects to a Mesh: pure, and every mistake is collected.

A bad object harms only itself. While it is bad its last good form stays in force; one that never
was good is left out, but a policy, or what policies select by, refuses everything in its place.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from xds_server.errors import Problem
from xds_server.groups import GATEWAY_GROUP, POLICY_VERSION
from xds_server.ingest.addresses import Contested, contested
from xds_server.ingest.attachment import attach, with_traffic
from xds_server.ingest.building import build_service, build_workload
from xds_server.ingest.core import (
    Pod,
    RawPort,
    RawService,
    Slice,
    read_node,
    read_pod,
    read_service,
    read_slice,
)
from xds_server.ingest.kinds import Sorted, sort_by_kind
from xds_server.ingest.lastgood import Forms, Key, readable
from xds_server.ingest.members import Members, members
from xds_server.ingest.policies import Origins, PolicyReader, services_aimed_at
from xds_server.ingest.policy_status import policy_statuses
from xds_server.ingest.reader import Item
from xds_server.ingest.refusals import read_policies
from xds_server.ingest.route_status import judge, protocols_of, settle
from xds_server.ingest.routes import ROUTE_KINDS, RouteReader, read_grant
from xds_server.ingest.scopes import NOTHING, Wishes, read_namespace
from xds_server.ingest.traffic import read_traffic
from xds_server.ir import Mesh, Name, Parent, Protocol, Service, Workload
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
    kinds, ignored, memo = found.kinds, found.ignored, forms.memo
    pod_readings = [forms.read(item, read_pod, ()) for item in kinds["Pod"]]
    service_readings = [forms.read(item, read_service, ()) for item in kinds["Service"]]
    slice_readings = [forms.read(item, read_slice, ()) for item in kinds["EndpointSlice"]]

    good_pods = [(one.item, one.value) for one in pod_readings if one.good and one.value]
    good_services = [one.value for one in service_readings if one.good]
    claims = _contested(good_pods, good_services, memo)
    # Policies are for bad pods, too, and for those that a bad service selects.
    bad_pods = [(one.item, one.value) for one in pod_readings if not one.good and one.value]
    bad_services = [one for one in service_readings if not one.good]
    pods = {pod.name: pod for _, pod in good_pods}
    pods |= {pod.name: memo(Pod.uncertain, pod) for _, pod in bad_pods}
    services = {raw.name: raw.without(claims.services) for raw in good_services}
    slices = [one.value for one in slice_readings if one.good and one.value]
    all_pods, all_services = memo.row(pods.values()), memo.row(services.values())
    portless = [memo(RawService.without_ports, one.value) for one in bad_services]
    portless += _gone_services(kinds, forms)
    behind = members(
        all_pods,
        memo.row([*all_services, *portless]),
        [
            *slices,
            *(memo(Slice.without_ports, s.value) for s in slice_readings if not s.good and s.value),
        ],
        memo,
    )

    grants = []
    for item in kinds["ReferenceGrant"]:
        granted = forms.read(item, read_grant, ())
        grants += granted.value if granted.good else []
    reader = RouteReader(services, grants)
    beside = (all_services, memo.value(tuple(grants)))
    judged = []
    for item in (item for kind in ROUTE_KINDS for item in kinds[kind]):
        one = judge(item, reader, forms, beside)
        if one is None:
            ignored.append(f"{item.subject} (no parent is a Service)")
        else:
            judged.append(one)
    routes, statuses = settle(judged, memo)
    ignored += (
        f"{raw.item.subject}: {said} (served as TCP)"
        for raw in services.values()
        for said in raw.foreign
    )

    wanted: dict[Name, set[int]] = defaultdict(set)
    for route in routes:
        for rule in route.rules:
            for name, number in rule.destinations:
                wanted[name].add(number)
    services = {
        name: memo(RawService.reached_at, raw, memo.row(sorted(wanted[name])))
        if raw.external
        else raw
        for name, raw in services.items()
    }
    reached = memo.row(services.values())
    protocols = memo(_protocols, reached, memo.value(protocols_of(routes)))
    traffic = [forms.read(item, read_traffic, ()) for item in kinds["TrafficPolicy"]]
    rules = memo.value(
        frozenset(
            (route.kind.value, route.name, name)
            for route in routes
            for name in ("", *(rule.name for rule in route.rules))
        )
    )
    raw_traffic = memo.row(one.value for one in traffic if one.good)
    attached = memo(attach, raw_traffic, reached, protocols, behind, rules)
    wishes = {
        item.name.name: forms.read(item, read_namespace, ()).value.over(defaults)
        for item in kinds["Namespace"]
    }
    node_readings = [forms.read(item, read_node, ()) for item in kinds["Node"]]
    zones = memo.value(
        frozenset((one.item.name.name, one.value) for one in node_readings if one.good)
    )
    found.problems.extend(attached.problems)
    pieces = defaultdict(list)
    for piece in slices:
        pieces[piece.service].append(piece)
    vague = {
        one.item.name
        for one in bad_services
        if not readable(one.item, lambda item: item.spec["selector"].labels())
    }
    opaque = {
        pod.name
        for item, pod in bad_pods
        if not readable(item, lambda item: item.root["metadata"]["labels"].labels())
    }
    named = memo.value(frozenset(one.item.name for one in service_readings))
    origins = memo(Origins, all_pods, memo.value(claims.pods))
    policies, closed = read_policies(
        kinds["AuthorizationPolicy"],
        PolicyReader(pods, named, vague, behind, origins),
        forms,
        opaque,
        suspects,
        (all_pods, named, memo.value(frozenset(vague)), behind, origins),
    )
    return Mesh(
        services={
            name: _service(services[name], pieces[name], protocols, memo)
            for name in memo(_names, reached)
        },
        workloads=memo(
            _workloads,
            all_pods,
            behind,
            protocols,
            zones,
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
        ignored=tuple(sorted(ignored)),
        kept=tuple(sorted(forms.kept)),
        left_out=tuple(sorted(set(forms.left_out) - set(closed))),
        closed=tuple(closed),
        statuses=(
            *policy_statuses(
                [*kinds["TrafficPolicy"], *kinds["AuthorizationPolicy"]],
                attached.statuses,
                forms.kept,
                {"Pod": pods, "Service": named},
            ),
            *statuses,
        ),
        registry_only=bool(defaults.closed),
        registry_only_in={name: bool(wish.closed) for name, wish in sorted(wishes.items())},
    )


def _gone_services(kinds: Mapping[str, Sequence[Item]], forms: Forms) -> list[RawService]:
    """Services that are no more, but that a policy is for, in its form now or its last good one."""
    wanted: set[Name] = set()
    for item in kinds["AuthorizationPolicy"]:
        former = forms.former(item)
        wanted |= forms.memo(services_aimed_at, item)
        wanted |= services_aimed_at(former) if former else set()
    wanted -= {item.name for item in kinds["Service"]}
    return [forms.memo(_bare_service, item) for item in forms.gone("Service", wanted)]


def _bare_service(item: Item) -> RawService:
    return read_service(item).without_ports()


def _contested(
    pods: Sequence[tuple[Item, Pod]], services: Sequence[RawService], memo: Memo
) -> Contested:
    looked: list[Contested] = []

    def look() -> Contested:
        looked.append(contested(pods, services))
        return looked[0]

    found = memo.by((contested, memo.row(pod for _, pod in pods), memo.row(services)), look)
    # What is contested is to be said each time.
    return found if looked or not (found.pods or found.services) else look()


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
