"""From Kubernetes objects to a Mesh: pure, and every mistake is collected."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from redirector.model import IPAddress
from xds_server.errors import Problem
from xds_server.ingest.attachment import Places, attach
from xds_server.ingest.clashes import clashes
from xds_server.ingest.core import (
    Members,
    Pod,
    RawPort,
    RawService,
    build_service,
    build_workload,
    read_pod,
    read_service,
    read_slice,
)
from xds_server.ingest.policies import POLICY_GROUP, POLICY_VERSION, Origins, PolicyReader
from xds_server.ingest.reader import Field, Item, identify
from xds_server.ingest.routes import GATEWAY_GROUP, RouteReader, read_grant
from xds_server.ingest.traffic import read_traffic
from xds_server.ir import Mesh, Name, Parent, Protocol
from xds_server.sources.objects import KubeObject

__all__ = ["ingest"]

_KINDS = {
    ("v1", "Namespace"),
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
    """The mesh that the objects describe, and everything that is wrong with them. A mesh that comes
    with problems is incomplete and not fit for use."""
    problems: list[Problem] = []
    kinds, ignored = _sorted_by_kind(objects, problems)

    pods = {pod.name: pod for pod in map(read_pod, kinds["Pod"]) if pod is not None}
    services = {item.name: read_service(item) for item in kinds["Service"]}
    _unique_addresses(kinds["Pod"], pods.values(), services.values())
    slices = [piece for piece in map(read_slice, kinds["EndpointSlice"]) if piece is not None]
    grants = [grant for item in kinds["ReferenceGrant"] for grant in read_grant(item)]

    route_reader = RouteReader(services, grants)
    routes = []
    for item in kinds["HTTPRoute"]:
        route = route_reader.read(item)
        if route is None:
            ignored.append(f"{item.subject} (no parent is a Service)")
        else:
            routes.append((item, route))
    clashes(routes)

    routed = {parent for _, route in routes for parent in route.parents}
    protocols = {
        port: _protocol(port, Parent(service.name, port.number) in routed)
        for service in services.values()
        for port in service.ports
    }
    members = Members(pods.values(), services.values(), slices)
    policy_reader = PolicyReader(pods, services, members, Origins(pods.values()))
    attached = attach(
        map(read_traffic, kinds["TrafficPolicy"]),
        Places(
            services,
            protocols,
            members.ports,
            {
                ("HTTPRoute", item.name): {
                    rule["name"].text("") for rule in item.spec["rules"].items()
                }
                for item in kinds["HTTPRoute"]
            },
        ),
    )
    pieces = defaultdict(list)
    for piece in slices:
        pieces[piece.service].append(piece)
    mesh = Mesh(
        services={
            name: build_service(services[name], pieces[name], protocols)
            for name in sorted(services)
        },
        workloads={
            name: build_workload(pods[name], members.ports[name], protocols)
            for name in sorted(pods)
        },
        routes=tuple(
            sorted(
                (attached.to_route(item.kind, route) for item, route in routes),
                key=lambda route: route.name,
            )
        ),
        policies=tuple(
            sorted(
                map(policy_reader.read, kinds["AuthorizationPolicy"]),
                key=lambda policy: policy.name,
            )
        ),
        traffic=attached.policies,
        ignored=tuple(sorted(ignored)),
        statuses=attached.statuses,
    )
    # A field that is read twice is wrong only once.
    return mesh, list(dict.fromkeys(problems))


def _sorted_by_kind(
    objects: Sequence[KubeObject], problems: list[Problem]
) -> tuple[defaultdict[str, list[Item]], list[str]]:
    kinds: defaultdict[str, list[Item]] = defaultdict(list)
    ignored: list[str] = []
    seen: dict[tuple[str, Name], str] = {}
    for source in objects:
        if foreign := _foreign_without_name(source):
            ignored.append(foreign)
            continue
        identity = identify(source, problems)
        if identity is None:
            continue
        version, item = identity
        if (version, item.kind) not in _KINDS:
            if version.split("/")[0] == POLICY_GROUP:
                # A policy that is misspelt must not be taken for somebody else's object.
                item.root["kind"].problem(
                    f"{version} has no such kind; use AuthorizationPolicy or TrafficPolicy of "
                    f"{POLICY_VERSION}"
                )
            else:
                ignored.append(f"{item.subject} ({version})")
            continue
        key = (item.kind, item.name)
        if key in seen:
            item.root["metadata"]["name"].problem(
                f"{seen[key]} has the same {item.kind}; remove one of them"
            )
            continue
        seen[key] = source.file
        kinds[item.kind].append(item)
    return kinds, ignored


def _foreign_without_name(source: KubeObject) -> str | None:
    """What to call an object of another program's kind that has no name (a kustomization)."""
    version, kind = source.data.get("apiVersion"), source.data.get("kind")
    metadata = source.data.get("metadata", {})
    if not isinstance(version, str) or not isinstance(kind, str) or (version, kind) in _KINDS:
        return None
    if version.split("/")[0] == POLICY_GROUP or not isinstance(metadata, dict):
        return None
    return None if "name" in metadata else f"{kind} ({version})"


def _protocol(port: RawPort, routed: bool) -> Protocol:
    if port.declared is not None:
        return port.declared
    return Protocol.HTTP if routed else Protocol.TCP


def _unique_addresses(
    items: Iterable[Item], pods: Iterable[Pod], services: Iterable[RawService]
) -> None:
    """Traffic is told apart by its destination, and a peer by its source."""
    items_by_name = {item.name: item for item in items}
    owners: dict[IPAddress, str] = {}

    def claim(address: IPAddress, item: Item, field: Field) -> None:
        owner = owners.setdefault(address, item.subject)
        if owner != item.subject:
            field.problem(f"{owner} has {address}, too; give each its own address")

    for pod in pods:
        for address in () if pod.host_network else pod.addresses:
            item = items_by_name[pod.name]
            claim(address, item, item.root["status"]["podIP"])
    for service in services:
        for address in service.addresses:
            claim(address, service.item, service.item.spec["clusterIP"])
