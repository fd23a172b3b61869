"""From Kubernetes objects to a Mesh: pure, and every mistake is collected.

A bad object harms only itself. While it is bad its last good form stays in force; one that never
was good is left out, but a policy, or what policies select by, refuses everything in its place.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from xds_server.errors import Problem
from xds_server.ingest.addresses import contested
from xds_server.ingest.attachment import Places, attach
from xds_server.ingest.building import build_service, build_workload
from xds_server.ingest.clashes import clashes
from xds_server.ingest.core import (
    Members,
    RawPort,
    read_node,
    read_pod,
    read_service,
    read_slice,
)
from xds_server.ingest.kinds import Sorted, sort_by_kind
from xds_server.ingest.lastgood import Forms, Key, readable
from xds_server.ingest.policies import POLICY_VERSION, Origins, PolicyReader
from xds_server.ingest.refusals import read_policies
from xds_server.ingest.routes import GATEWAY_GROUP, RouteReader, read_grant
from xds_server.ingest.traffic import read_traffic
from xds_server.ir import Mesh, Name, Parent, Protocol
from xds_server.sources.objects import KubeObject

__all__ = ["Ingester", "ingest"]

_KINDS = {
    ("v1", "Namespace"),
    ("v1", "Node"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
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

    def __init__(self) -> None:
        self._good: Mapping[Key, KubeObject] = {}

    def ingest(
        self, objects: Sequence[KubeObject], suspects: Collection[str] = ()
    ) -> tuple[Mesh, list[Problem]]:
        """The mesh, and everything that is wrong. `suspects` are namespaces for which there may be
        policies in what nobody could read: everything is refused there."""
        forms = Forms(self._good)
        found = sort_by_kind(objects, _KINDS, forms)
        mesh = _mesh(found, {*found.suspects, *suspects}, forms)
        self._good = forms.good
        # A field that is read twice is wrong only once.
        return mesh, list(dict.fromkeys([*found.problems, *forms.problems]))


def _mesh(found: Sorted, suspects: Collection[str], forms: Forms) -> Mesh:
    kinds, ignored = found.kinds, found.ignored
    pod_readings = [forms.read(item, read_pod) for item in kinds["Pod"]]
    service_readings = [forms.read(item, read_service) for item in kinds["Service"]]
    slice_readings = [forms.read(item, read_slice) for item in kinds["EndpointSlice"]]

    good_pods = [(one.item, one.value) for one in pod_readings if one.good and one.value]
    good_services = [one.value for one in service_readings if one.good]
    claims = contested(good_pods, good_services)
    # Policies are for bad pods, too, and for those that a bad service selects.
    bad_pods = [(one.item, one.value) for one in pod_readings if not one.good and one.value]
    bad_services = [one for one in service_readings if not one.good]
    pods = {pod.name: pod for _, pod in good_pods}
    pods |= {pod.name: pod.uncertain() for _, pod in bad_pods}
    services = {raw.name: raw.without(claims.services) for raw in good_services}
    slices = [one.value for one in slice_readings if one.good and one.value]
    members = Members(
        pods.values(),
        [*services.values(), *(one.value.without_ports() for one in bad_services)],
        [*slices, *(s.value.without_ports() for s in slice_readings if not s.good and s.value)],
    )

    grants = []
    for item in kinds["ReferenceGrant"]:
        granted = forms.read(item, read_grant)
        grants += granted.value if granted.good else []
    route_reader = RouteReader(services, grants)
    routes = []
    for item in kinds["HTTPRoute"]:
        reading = forms.read(item, route_reader.read)
        if reading.value is None:
            ignored.append(f"{item.subject} (no parent is a Service)")
        elif reading.good:
            routes.append((reading.item, reading.value))
    clashes(routes)
    ignored += (
        f"{raw.item.subject}: {said} (served as TCP)"
        for raw in services.values()
        for said in raw.foreign
    )

    wanted: dict[Name, set[int]] = defaultdict(set)
    for _, route in routes:
        for rule in route.rules:
            for backend in rule.backends:
                wanted[backend.service].add(backend.port)
    services = {name: raw.reached_at(wanted[name]) for name, raw in services.items()}
    routed = {parent for _, route in routes for parent in route.parents}
    protocols = {
        port: _protocol(port, Parent(service.name, port.number) in routed)
        for service in services.values()
        for port in service.ports
    }
    traffic = [forms.read(item, read_traffic) for item in kinds["TrafficPolicy"]]
    attached = attach(
        [one.value for one in traffic if one.good],
        Places(
            services,
            protocols,
            members.ports,
            {
                ("HTTPRoute", item.name): {
                    rule["name"].text("") for rule in item.spec["rules"].items()
                }
                for item, _ in routes
            },
        ),
    )
    node_readings = [forms.read(item, read_node) for item in kinds["Node"]]
    nodes = {one.item.name.name: one.value for one in node_readings if one.good}
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
    named = {one.item.name for one in service_readings}
    policies, closed = read_policies(
        kinds["AuthorizationPolicy"],
        PolicyReader(pods, named, vague, members, Origins(pods.values(), claims.pods)),
        forms,
        opaque,
        suspects,
    )
    return Mesh(
        services={
            name: build_service(services[name], pieces[name], protocols)
            for name in sorted(services)
        },
        workloads={
            name: build_workload(
                pods[name],
                members.ports[name],
                protocols,
                pods[name].zone or nodes.get(pods[name].node) or members.zones.get(name, ""),
            )
            for name in sorted(pods)
        },
        routes=tuple(
            sorted(
                (attached.to_route(item.kind, route) for item, route in routes),
                key=lambda route: route.name,
            )
        ),
        policies=tuple(sorted(policies, key=lambda policy: policy.name)),
        traffic=attached.policies,
        ignored=tuple(sorted(ignored)),
        kept=tuple(sorted(forms.kept)),
        left_out=tuple(sorted(set(forms.left_out) - set(closed))),
        closed=tuple(closed),
        statuses=attached.statuses,
    )


def _protocol(port: RawPort, routed: bool) -> Protocol:
    if port.declared is not None:
        return port.declared
    return Protocol.HTTP if routed else Protocol.TCP
