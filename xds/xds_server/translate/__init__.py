"""From a Mesh to the resources of one sidecar: pure, sorted, equal for equal input."""

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property, lru_cache

from google.protobuf.message import Message

from xds_server.ir import AppPort, Mesh, Name, NodeId, Parent, Policy, Route, TrafficPolicy
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE
from xds_server.translate.clusters import (
    INBOUND,
    cluster_name,
    fixed_clusters,
    outbound_clusters,
    outbound_endpoints,
)
from xds_server.translate.inbound import inbound_listener, inbound_name, inbound_routes
from xds_server.translate.outbound import OUTBOUND, outbound_listener
from xds_server.translate.routes import route_configuration
from xds_server.translate.traffic import configure, for_requests

__all__ = ["CLUSTER", "ENDPOINT", "LISTENER", "ROUTE", "Resources", "Translator", "translate"]

#: type URL -> resource name -> message. Messages are shared between nodes: do not change them.
Resources = Mapping[str, Mapping[str, Message]]


def translate(mesh: Mesh, node: NodeId) -> Resources:
    """All resources of one sidecar. A pod that is not in the mesh gets what passes everything
    through, under the policies that hold for its whole namespace."""
    return _translator(mesh).resources(node)


@lru_cache(maxsize=2)
def _translator(mesh: Mesh) -> "Translator":
    return Translator(mesh)


class Translator:
    """One mesh, for any number of nodes: what they share is made once."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._policies: dict[Name, list[Policy]] = defaultdict(list)
        self._namespace_policies: dict[str, list[Policy]] = defaultdict(list)
        for policy in mesh.policies:
            if policy.targets is None:
                self._namespace_policies[policy.name.namespace].append(policy)
            else:
                for name in policy.targets:
                    self._policies[name].append(policy)
        self._routes: dict[Parent, list[Route]] = defaultdict(list)
        for route in mesh.routes:
            for parent in route.parents:
                self._routes[parent].append(route)
        self._consumers = {
            route.name.namespace
            for parent, routes in self._routes.items()
            for route in routes
            if route.name.namespace != parent.service.namespace
        }
        self._traffic = {parent: policy for policy in mesh.traffic for parent in policy.services}
        self._arrivals: dict[Name, dict[int, TrafficPolicy]] = defaultdict(dict)
        for traffic in mesh.traffic:
            for place in traffic.pods:
                self._arrivals[place.pod][place.port] = traffic
        self._inbound_by_kind: dict[object, tuple[Message, dict[str, Message]]] = {}
        self._routes_by_consumer: dict[str | None, dict[str, Message]] = {}

    def resources(self, node: NodeId) -> Resources:
        name = Name(node.namespace, node.pod)
        workload = self._mesh.workloads.get(name)
        policies = tuple(
            sorted(
                (*self._namespace_policies.get(node.namespace, ()), *self._policies.get(name, ())),
                key=lambda policy: policy.name,
            )
        )
        arrivals = self._arrivals.get(name, {})
        inbound, inbound_by_port = self._inbound(
            workload.ports if workload else (), policies, arrivals
        )
        if workload is None:
            return {
                CLUSTER: self._fixed,
                ENDPOINT: {},
                LISTENER: {INBOUND: inbound, OUTBOUND: outbound_listener(())},
                ROUTE: {},
            }
        routes = self._outbound_routes(node.namespace) | inbound_by_port
        return {
            CLUSTER: self._clusters,
            ENDPOINT: self._endpoints,
            LISTENER: {INBOUND: inbound, OUTBOUND: self._outbound},
            ROUTE: dict(sorted(routes.items())),
        }

    def _inbound(
        self,
        ports: tuple[AppPort, ...],
        policies: tuple[Policy, ...],
        arrivals: Mapping[int, TrafficPolicy],
    ) -> tuple[Message, dict[str, Message]]:
        """Listener, and the routes of its HTTP ports; pods of one kind share them."""
        traffic = tuple(sorted((port, policy.name) for port, policy in arrivals.items()))
        key = (ports, tuple(policy.name for policy in policies), traffic)
        if key not in self._inbound_by_kind:
            routes: dict[str, Message] = {
                inbound_name(port.number): inbound_routes(
                    port.number, policies, arrivals.get(port.number)
                )
                for port in ports
                if port.protocol.is_http
            }
            self._inbound_by_kind[key] = (inbound_listener(ports, policies, arrivals), routes)
        return self._inbound_by_kind[key]

    @cached_property
    def _fixed(self) -> dict[str, Message]:
        return fixed_clusters()

    @cached_property
    def _clusters(self) -> dict[str, Message]:
        clusters = self._fixed | outbound_clusters(self._mesh.services.values(), self._traffic)
        return dict(sorted(clusters.items()))

    @cached_property
    def _endpoints(self) -> dict[str, Message]:
        return dict(sorted(outbound_endpoints(self._mesh.services.values()).items()))

    @cached_property
    def _outbound(self) -> Message:
        outbound: Message = outbound_listener(self._mesh.services.values())
        return outbound

    def _outbound_routes(self, namespace: str) -> dict[str, Message]:
        """Routes for clients of a namespace. A route that lives with its service (producer) is for
        all; one that lives elsewhere is for the clients of its own namespace (consumer), and
        there goes before the producer's (Gateway API for service mesh, "Route namespace")."""
        consumer = namespace if namespace in self._consumers else None
        if consumer not in self._routes_by_consumer:
            found: dict[str, Message] = {}
            for service in self._mesh.services.values():
                for port in service.ports:
                    # No listener asks for the routes of a service without an address.
                    if port.protocol.is_http and service.addresses:
                        parent = Parent(service.name, port.number)
                        name = cluster_name(service.name, port.number)
                        made = route_configuration(parent, self._chosen(parent, consumer))
                        policy = self._traffic.get(parent)
                        configure(made, for_requests(policy.fault if policy else None, None))
                        found[name] = made
            self._routes_by_consumer[consumer] = found
        return self._routes_by_consumer[consumer]

    def _chosen(self, parent: Parent, consumer: str | None) -> list[Route]:
        routes = self._routes.get(parent, [])
        own = [route for route in routes if route.name.namespace == consumer]
        home = parent.service.namespace
        return own or [route for route in routes if route.name.namespace == home]
