"""From a Mesh to the resources of one sidecar: pure, sorted, equal for equal input."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from google.protobuf.message import Message

from xds_server.ir import (
    EVERYTHING,
    AppPort,
    Client,
    Mesh,
    Name,
    NodeId,
    Parent,
    Policy,
    Route,
    Service,
    TrafficPolicy,
    Workload,
    protocols_of,
)
from xds_server.memo import Memo
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE
from xds_server.translate.clusters import (
    INBOUND,
    cluster_name,
    fixed_clusters,
    outbound_clusters,
    outbound_endpoints,
)
from xds_server.translate.inbound import inbound_listener, inbound_routes
from xds_server.translate.outbound import OUTBOUND, outbound_listener
from xds_server.translate.policies import connection_rules
from xds_server.translate.proxyless import Proxyless
from xds_server.translate.routes import route_configuration
from xds_server.translate.traffic import configure, faults
from xds_server.translate.views import Row, View, Views

__all__ = [
    "CLUSTER",
    "ENDPOINT",
    "FILTER",
    "LISTENER",
    "ROUTE",
    "Resources",
    "Translator",
    "translate",
]

#: type URL -> resource name -> message. Messages are shared between nodes: do not change them.
Resources = Mapping[str, Mapping[str, Message]]
#: Clusters, endpoints, the outbound listener and its routes.
Outward: TypeAlias = tuple[
    Mapping[str, Message], Mapping[str, Message], Message, Mapping[str, Message]
]
#: A pod's own listener, and its routes and filters by their names.
Inbound: TypeAlias = tuple[Message, Mapping[str, Message], Mapping[str, Message]]


@dataclass(frozen=True)
class _Place:
    """What is a node's own, and of which kind it is: nodes of one kind get the same."""

    name: Name
    workload: Workload | None
    inbound: Inbound
    kind: tuple[object, ...] = ()


def translate(mesh: Mesh, node: NodeId) -> Resources:
    """All resources of one sidecar. A pod that is not in the mesh gets what passes everything
    through, under the policies that hold for its whole namespace; if there are policies for single
    pods, too, nobody knows whether for this one, and nothing reaches it."""
    return _translator(mesh).resources(node)


@lru_cache(maxsize=2)
def _translator(mesh: Mesh) -> "Translator":
    return Translator(mesh)


class Translator:
    """One mesh, for any number of nodes: what they share is made once, and what is made of the same
    objects of the mesh as in the one `after` which this comes is taken over from there."""

    def __init__(self, mesh: Mesh, after: "Translator | None" = None) -> None:
        self.memo: Memo = Memo(after.memo if after else None)
        self._proxyless = Proxyless(self.memo)
        self._mesh = mesh
        self._policies: dict[Name, list[Policy]] = defaultdict(list)
        self._namespace_policies: dict[str, list[Policy]] = defaultdict(list)
        for policy in mesh.policies:
            if policy.targets is None:
                self._namespace_policies[policy.name.namespace].append(policy)
            else:
                for name in policy.targets:
                    self._policies[name].append(policy)
        #: Namespaces with policies for some of their pods: a pod that nobody knows may be one.
        self._choosy = {p.name.namespace for p in mesh.policies if p.targets is not None}
        self._routes: dict[Parent, list[Route]] = defaultdict(list)
        for route in mesh.routes:
            for parent in route.parents:
                self._routes[parent].append(route)
        consuming: dict[str, list[Route]] = defaultdict(list)
        for route in mesh.routes:
            if route.own_parents != route.parents:
                consuming[route.name.namespace].append(route)
        #: What routes say of ports to the clients of their own namespace.
        self._consumers = {name: protocols_of(own, name) for name, own in consuming.items()}
        self._traffic = {parent: policy for policy in mesh.traffic for parent in policy.services}
        self._arrivals: dict[Name, dict[int, TrafficPolicy]] = defaultdict(dict)
        for traffic in mesh.traffic:
            for place in traffic.pods:
                self._arrivals[place.pod][place.port] = traffic
        #: By what tells sidecars apart in it; the view is held for its identity.
        self._outward: dict[tuple[object, ...], tuple[View, Outward]] = {}
        row = self.memo.row
        self._all_policies, self._all_traffic = row(mesh.policies), row(mesh.traffic)
        self._all_routes = row(mesh.routes)
        #: What nodes had in the mesh before, as far as the same policies hold, and what they have.
        same = after is not None and after._judged == self._judged
        self._before: Mapping[NodeId, _Place] = after._places if after and same else {}
        self._places: dict[NodeId, _Place] = {}
        self._inbounds: set[int] = set()
        #: By the identity of what tells nodes apart; that is held for its identity.
        self._wholes: dict[int, tuple[tuple[object, ...], Resources]] = {}
        self._kinds: dict[tuple[object, ...], tuple[object, ...]] = {}
        asked = {
            name: {parent.service for route in own for parent in route.parents}
            for name, own in consuming.items()
        }
        self._views = Views(mesh.services, self.memo, asked)
        self._zones = frozenset(z for service in mesh.services.values() for z in service.zones)
        self._nodes = frozenset(n for service in mesh.services.values() for n in service.nodes)
        #: Every node is of the kind that it was of before.
        self._alike = after is not None and after._ground == self._ground

    @property
    def _ground(self) -> tuple[object, ...]:
        """All that the kinds of nodes depend on."""
        return id(self._mesh.workloads), *self._judged, *self._consumers, self._zones, self._nodes

    @property
    def _judged(self) -> tuple[int, int]:
        return id(self._all_policies), id(self._all_traffic)

    def resources(self, node: NodeId) -> Resources:
        """All resources of one sidecar; the same value for sidecars of one kind."""
        known = self._before.get(node)
        kind = known.kind if known is not None and self._alike else None
        if known is not None and (whole := self._wholes.get(id(kind))):
            self._places[node] = known
            return whole[1]
        name = known.name if known else Name(node.namespace, node.pod)
        workload = self._mesh.workloads.get(name)
        memo = self.memo
        consumer = node.namespace if node.namespace in self._consumers else None
        if node.client is Client.GRPC:
            view = self._views.of(workload.scope if workload else EVERYTHING, node.namespace)
            routes = self._outbound_routes(view, consumer)
            clusters, endpoints = self._upstream(view, consumer, workload)
            # Of whatever name clients make up nothing is to be kept.
            namespace = node.namespace if node.namespace in self._views.namespaces else ""
            return memo(
                self._proxyless.resources,
                self._heard(view.bare, consumer),
                clusters,
                endpoints,
                routes,
                namespace,
            )
        if (
            known is None
            or known.workload is not workload
            or id(known.inbound) not in self._inbounds
        ):
            own = name if workload is not None else self._as_judged(name)
            inbound = memo(
                self._inbound_of,
                self._all_policies,
                self._all_traffic,
                workload.ports if workload else None,
                own.namespace,
                own.name,
            )
            self._inbounds.add(id(inbound))
            known = _Place(name, workload, inbound)
        inbound = known.inbound
        if workload is None:
            mesh = self._mesh
            closed = mesh.registry_only_in.get(node.namespace, mesh.registry_only)
            return memo(self._unknown, inbound, closed)
        view = self._views.of(workload.scope, node.namespace)
        place = self._place(workload)
        key = (id(view), consumer, *place, workload.closed)
        if key not in self._outward:
            self._outward[key] = (view, self._outward_of(view, consumer, workload))
        if kind is None:
            scope = None if workload.scope.everything else (workload.scope, node.namespace)
            kind = (scope, consumer, *place, workload.closed, id(inbound))
            kind = self._kinds.setdefault(kind, kind)
        if id(kind) not in self._wholes:
            self._wholes[id(kind)] = kind, memo(self._whole, *self._outward[key][1], inbound)
        self._places[node] = replace(known, kind=kind)
        return self._wholes[id(kind)][1]

    def _as_judged(self, name: Name) -> Name:
        """An unknown pod, in the words of the policies: all of which they know nothing are one."""
        if name in self._policies or name in self._arrivals:
            return name
        namespace = name.namespace
        judged = namespace in self._namespace_policies or namespace in self._choosy
        return Name(namespace if judged else "", "")

    def _outward_of(self, view: View, consumer: str | None, workload: Workload) -> Outward:
        memo = self.memo
        services = self._heard(view.bare, consumer)
        outbound = (
            memo(_closed_listener, services, memo(self._headless, view.services))
            if workload.closed
            else memo(_listener, services)
        )
        clusters, endpoints = self._upstream(view, consumer, workload)
        return clusters, endpoints, outbound, self._outbound_routes(view, consumer)

    def _upstream(
        self, view: View, consumer: str | None, workload: Workload | None
    ) -> tuple[Mapping[str, Message], Mapping[str, Message]]:
        """Clusters and their endpoints, as seen from a pod's place: of these services, and of those
        that routes of theirs lead to."""
        zone, node = self._place(workload)
        if view is not self._views.everything:
            led = self.memo(self._led_to, view.bare, self._all_routes, consumer)
            view = self._views.with_more(view, led)
        return (
            self.memo(self._clusters, self._heard(view.bare, consumer), self._all_traffic),
            self.memo(self._endpoints, view.services, zone, node),
        )

    def _place(self, workload: Workload | None) -> tuple[str, str]:
        """A pod's zone and node, if it makes a difference to any service."""
        zone = workload.zone if workload else ""
        node = workload.node if workload else ""
        return zone if zone in self._zones else "", node if node in self._nodes else ""

    def _led_to(
        self, services: tuple[Service, ...], _routes: tuple[Route, ...], consumer: str | None
    ) -> tuple[Name, ...]:
        """The services beyond these that routes of these lead to."""
        found = {
            name
            for parent in services
            for port in parent.ports
            for route in self._chosen(Parent(parent.name, port.number), consumer)
            for rule in route.rules
            for name, _ in rule.destinations
        }
        return tuple(sorted(found - {service.name for service in services}))

    def _headless(self, services: tuple[Service, ...]) -> tuple[Service, ...]:
        return self.memo.row(one for one in services if not one.addresses and not one.hostname)

    def _whole(
        self,
        clusters: Mapping[str, Message],
        endpoints: Mapping[str, Message],
        outbound: Message,
        routes: Mapping[str, Message],
        inbound: Inbound,
    ) -> Resources:
        own, own_routes, own_filters = inbound
        return {
            CLUSTER: clusters,
            ENDPOINT: endpoints,
            LISTENER: self.memo(_two_listeners, own, outbound),
            ROUTE: self.memo(_merged, routes, own_routes),
            FILTER: own_filters,
        }

    def _unknown(self, inbound: Inbound, closed: int) -> Resources:
        """What a pod gets that is not in the mesh."""
        nobody: tuple[Service, ...] = self.memo.row(())
        outbound = (
            self.memo(_closed_listener, nobody, nobody) if closed else self.memo(_listener, nobody)
        )
        return {
            CLUSTER: self.memo(fixed_clusters),
            ENDPOINT: self.memo(_nothing),
            LISTENER: self.memo(_two_listeners, inbound[0], outbound),
            ROUTE: self.memo(_nothing),
            FILTER: inbound[2],
        }

    def _inbound_of(
        self,
        _policies: tuple[Policy, ...],
        _traffic: tuple[TrafficPolicy, ...],
        ports: tuple[AppPort, ...] | None,
        namespace: str,
        pod: str,
    ) -> Inbound:
        """What comes in to a pod; it stays while the policies and the pod's ports do."""
        name = Name(namespace, pod)
        unknown = []
        if ports is None and namespace in self._choosy:
            refusal = Policy.refusal(Name(namespace, "(unknown pod)"), None)
            unknown.append(self.memo.value(refusal))
        policies = sorted(
            (
                *self._namespace_policies.get(namespace, ()),
                *self._policies.get(name, ()),
                *unknown,
            ),
            key=lambda policy: policy.name,
        )
        arrivals = sorted(self._arrivals.get(name, {}).items())
        row = self.memo.row
        return self.memo(
            _inbound,
            self.memo.value(ports or ()),
            row(policies),
            row(port for port, _ in arrivals),
            row(policy for _, policy in arrivals),
        )

    def _clusters(
        self, services: tuple[Service, ...], _traffic: tuple[TrafficPolicy, ...]
    ) -> Mapping[str, Message]:
        found = dict(self.memo(fixed_clusters))
        for service in services:
            policies = self.memo.row(
                self._traffic.get(Parent(service.name, port.number)) for port in service.ports
            )
            found |= self.memo(_service_clusters, service, policies)
        return dict(sorted(found.items()))

    def _endpoints(
        self, services: tuple[Service, ...], zone: str, node: str
    ) -> Mapping[str, Message]:
        found: dict[str, Message] = {}
        for service in services:
            here = zone if zone in service.zones else "", node if node in service.nodes else ""
            found |= self.memo(_service_endpoints, service, *here)
        return dict(sorted(found.items()))

    def _outbound_routes(self, view: View, consumer: str | None) -> Mapping[str, Message]:
        services = self._heard(view.bare, consumer)
        return self.memo(self._routes_for, services, self._all_routes, self._all_traffic, consumer)

    def _heard(self, services: Row, consumer: str | None) -> Row:
        return self._views.heard(services, self._consumers.get(consumer or "", frozenset()))

    def _routes_for(
        self,
        services: tuple[Service, ...],
        _routes: tuple[Route, ...],
        _traffic: tuple[TrafficPolicy, ...],
        consumer: str | None,
    ) -> Mapping[str, Message]:
        """Routes for clients of a namespace. A route that lives with its service (producer) is for
        all; one that lives elsewhere is for the clients of its own namespace (consumer), and
        there goes before the producer's (Gateway API for service mesh, "Route namespace")."""
        found: dict[str, Message] = {}
        for service in services:
            for port in service.ports:
                # No listener asks for the routes of a service without an address.
                if port.protocol.is_http and service.addresses:
                    parent = Parent(service.name, port.number)
                    found[cluster_name(service.name, port.number)] = self.memo(
                        _port_routes,
                        service,
                        port.number,
                        self.memo.row(self._chosen(parent, consumer)),
                        self._traffic.get(parent),
                    )
        return found

    def _chosen(self, parent: Parent, consumer: str | None) -> list[Route]:
        routes = self._routes.get(parent, [])
        own = [route for route in routes if route.name.namespace == consumer]
        home = parent.service.namespace
        return own or [route for route in routes if route.name.namespace == home]


def _listener(services: tuple[Service, ...]) -> Message:
    made: Message = outbound_listener(services)
    return made


def _closed_listener(services: tuple[Service, ...], headless: tuple[Service, ...]) -> Message:
    made: Message = outbound_listener(services, closed=True, headless=headless)
    return made


def _two_listeners(inbound: Message, outbound: Message) -> Mapping[str, Message]:
    return {INBOUND: inbound, OUTBOUND: outbound}


def _merged(some: Mapping[str, Message], others: Mapping[str, Message]) -> Mapping[str, Message]:
    return dict(sorted({**some, **others}.items()))


def _nothing() -> Mapping[str, Message]:
    return {}


def _inbound(
    ports: tuple[AppPort, ...],
    policies: tuple[Policy, ...],
    numbers: tuple[int, ...],
    traffic: tuple[TrafficPolicy, ...],
) -> Inbound:
    """Listener, the routes of its HTTP ports, and filters; pods of one kind share them."""
    arrivals = dict(zip(numbers, traffic, strict=True))
    is_http = any(port.protocol.is_http for port in ports)
    routes: dict[str, Message] = {INBOUND: inbound_routes(policies)} if is_http else {}
    return inbound_listener(ports, policies, arrivals), routes, connection_rules(policies)


def _service_clusters(
    service: Service, policies: tuple[TrafficPolicy | None, ...]
) -> Mapping[str, Message]:
    traffic = {
        Parent(service.name, port.number): policy
        for port, policy in zip(service.ports, policies, strict=True)
        if policy is not None
    }
    return outbound_clusters((service,), traffic)


def _service_endpoints(service: Service, zone: str, node: str) -> Mapping[str, Message]:
    return outbound_endpoints((service,), zone, node)


def _port_routes(
    service: Service, port: int, routes: tuple[Route, ...], policy: TrafficPolicy | None
) -> Message:
    made: Message = route_configuration(Parent(service.name, port), routes)
    configure(made, faults(policy.fault if policy else None))
    return made
