"""Of which objects a sidecar's resource was made: whose status tells that it is refused. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from xds_server.ir import Mesh, Name, NodeId, Parent
from xds_server.quarantine import Quarantined
from xds_server.references import CLUSTER, FILTER, LISTENER, ROUTE
from xds_server.statuses import Refusal
from xds_server.translate.clusters import INBOUND, cluster_name

#: Kind and name of an object, and the Service by which it is concerned, if it is by one.
Culprit = tuple[str, Name, Name | None]


def refusals(
    mesh: Mesh, refused: Iterable[tuple[NodeId, Quarantined]]
) -> dict[tuple[str, Name], list[Refusal]]:
    """By kind and name of objects, which sidecars refuse what was made of them."""
    found: defaultdict[tuple[str, Name], list[Refusal]] = defaultdict(list)
    for node, what in refused:
        sidecar = f"{node.pod}.{node.namespace}"
        for kind, name, service in culprits(mesh, node, what.type_url, what.name):
            found[kind, name].append(Refusal(sidecar, what.error, service))
    return dict(found)


def culprits(mesh: Mesh, node: NodeId, type_url: str, name: str) -> Iterator[Culprit]:
    """The objects with a status that a resource of a sidecar depends on; none for what depends on
    Services and pods alone."""
    pod = Name(node.namespace, node.pod)
    if type_url == FILTER or (type_url == ROUTE and name == INBOUND):
        yield from _judges(mesh, pod)
        return
    if name == INBOUND:
        if type_url == LISTENER:
            yield from _arrivals(mesh, pod)
        return
    if type_url == ROUTE:
        for route in mesh.routes:
            for parent in route.parents:
                # A route that lives elsewhere than its Service is for its own namespace's clients.
                home = (parent.service.namespace, node.namespace)
                if _named(parent, name) and route.name.namespace in home:
                    yield route.kind, route.name, parent.service
    if type_url in (CLUSTER, ROUTE):
        for traffic in mesh.traffic:
            for parent in traffic.services:
                if _named(parent, name):
                    yield "TrafficPolicy", traffic.name, parent.service


def _named(parent: Parent, name: str) -> bool:
    return cluster_name(parent.service, parent.port) == name


def _judges(mesh: Mesh, pod: Name) -> Iterator[Culprit]:
    for policy in mesh.policies:
        concerned = policy.name.namespace == pod.namespace
        if pod in policy.targets if policy.targets is not None else concerned:
            yield "AuthorizationPolicy", policy.name, None


def _arrivals(mesh: Mesh, pod: Name) -> Iterator[Culprit]:
    for traffic in mesh.traffic:
        if any(place.pod == pod for place in traffic.pods):
            yield "TrafficPolicy", traffic.name, None
