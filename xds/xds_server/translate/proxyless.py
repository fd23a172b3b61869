"""What gRPC's own xDS client is given in a sidecar's stead: the same services, split the same way.

Such a client asks for one listener by the name in its target (`xds:///web.demo:80`), and from there
for routes, clusters and endpoints. It refuses much of what Envoy takes, and ignores most of the
rest: what is kept here is what it knows. Source: gRPC proposals A27 (clients), A28 (routing), A31
(timeouts), A44 (retries), and the validation in grpc/src/core/xds/grpc.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3 import route_components_pb2
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.http.router.v3.router_pb2 import Router
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as manager_pb2,
)
from google.protobuf.message import Message

from xds_server.ir import Name, Service
from xds_server.memo import Memo
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE
from xds_server.translate.actions import MILLION
from xds_server.translate.clusters import RESOLVED, cluster_name
from xds_server.translate.listeners import stat_prefix
from xds_server.translate.messages import ads, packed

_DNS = (Cluster.STRICT_DNS, Cluster.LOGICAL_DNS)
#: What of Envoy's `retry_on` gRPC knows.
_RETRIED = ("cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable")


class Proxyless:
    """The resources of gRPC's clients, made of those of sidecars."""

    def __init__(self, memo: Memo) -> None:
        self._memo = memo

    def resources(
        self,
        services: tuple[Service, ...],
        clusters: Mapping[str, Message],
        assignments: Mapping[str, Message],
        routes: Mapping[str, Message],
        namespace: str,
    ) -> Mapping[str, Mapping[str, Message]]:
        """All of them for clients in a namespace: type URL -> name -> message."""
        memo = self._memo
        taken = memo(self._clusters, clusters)
        return {
            CLUSTER: taken,
            ENDPOINT: memo(self._endpoints, taken, assignments),
            LISTENER: memo(self._listeners, services, routes, namespace),
            ROUTE: memo(self._routes, services, routes),
        }

    def _listeners(
        self, services: tuple[Service, ...], envoy: Mapping[str, Message], namespace: str
    ) -> Mapping[str, Message]:
        found: dict[str, Message] = {}
        for service in services:
            for port in service.ports:
                routed = cluster_name(service.name, port.number) in envoy
                how = "rds" if routed else "all"
                found |= self._memo(_of_port, service, port.number, namespace, how)
        return dict(sorted(found.items()))

    def _clusters(self, envoy: Mapping[str, Message]) -> Mapping[str, Message]:
        """Those that name endpoints, or none."""
        return {
            name: self._memo(cluster, entry)
            for name, entry in envoy.items()
            if isinstance(entry, Cluster) and entry.type != Cluster.ORIGINAL_DST
        }

    def _endpoints(
        self, clusters: Mapping[str, Message], envoy: Mapping[str, Message]
    ) -> Mapping[str, Message]:
        """An assignment for each cluster that asks for one."""
        found: dict[str, Message] = {}
        for name, entry in clusters.items():
            assignment = envoy.get(name)
            if isinstance(assignment, ClusterLoadAssignment):
                found[name] = self._memo(endpoints, assignment)
            elif isinstance(entry, Cluster) and entry.type == Cluster.EDS:
                found[name] = self._memo(no_endpoints, name)
        return found

    def _routes(
        self, services: tuple[Service, ...], envoy: Mapping[str, Message]
    ) -> Mapping[str, Message]:
        found: dict[str, Message] = {}
        for service in services:
            for port in service.ports:
                name = cluster_name(service.name, port.number)
                table = envoy.get(name)
                if isinstance(table, RouteConfiguration):
                    found[name] = self._memo(routes, table, port.number)
        return dict(sorted(found.items()))


def _of_port(service: Service, port: int, namespace: str, how: str) -> Mapping[str, Message]:
    return {
        target: api_listener(target, service.name, port, routed=how == "rds")
        for target in targets(service.name, port, namespace)
    }


def targets(service: Name, port: int, namespace: str) -> Iterator[str]:
    """By which names clients in a namespace may ask for a service's port."""
    full = f"{service.name}.{service.namespace}"
    yield f"{full}.svc.cluster.local:{port}"
    yield f"{full}.svc:{port}"
    yield f"{full}:{port}"
    if service.namespace == namespace:
        yield f"{service.name}:{port}"


def api_listener(target: str, service: Name, port: int, *, routed: bool) -> Listener:
    """The listener of one target: its routes by RDS, or all calls to the service's endpoints."""
    name = cluster_name(service, port)
    manager = manager_pb2.HttpConnectionManager(stat_prefix=stat_prefix(name))
    if routed:
        manager.rds.config_source.CopyFrom(ads())
        manager.rds.route_config_name = name
    else:
        host = manager.route_config.virtual_hosts.add(name="*", domains=["*"])
        route = host.routes.add()
        route.match.prefix = ""
        route.route.cluster = name
    manager.http_filters.add(name="router").typed_config.CopyFrom(packed(Router()))
    result = Listener(name=target)
    result.api_listener.api_listener.CopyFrom(packed(manager))
    return result


def cluster(envoy: Cluster) -> Cluster:
    """A cluster as gRPC takes it; one that it cannot have has no endpoints."""
    result = Cluster(name=envoy.name, lb_policy=Cluster.ROUND_ROBIN)
    by_name = envoy.type in _DNS or envoy.cluster_type.name == RESOLVED
    if by_name and _one_endpoint(envoy.load_assignment):
        result.type = Cluster.LOGICAL_DNS
        result.load_assignment.CopyFrom(envoy.load_assignment)
    else:
        result.type = Cluster.EDS
        result.eds_cluster_config.eds_config.CopyFrom(ads())
    for thresholds in envoy.circuit_breakers.thresholds[:1]:
        # Unlimited by default, as without a sidecar; gRPC's own default is 1,024.
        result.circuit_breakers.thresholds.add().max_requests.CopyFrom(thresholds.max_requests)
    return result


def _one_endpoint(assignment: ClusterLoadAssignment) -> bool:
    return [len(each.lb_endpoints) for each in assignment.endpoints] == [1]


def no_endpoints(name: str) -> ClusterLoadAssignment:
    """For a cluster that has none for gRPC: calls fail with UNAVAILABLE."""
    return ClusterLoadAssignment(cluster_name=name)


def endpoints(envoy: ClusterLoadAssignment) -> ClusterLoadAssignment:
    """Each locality once for each priority, with a weight: gRPC sends nothing to one without."""
    result = ClusterLoadAssignment(cluster_name=envoy.cluster_name)
    groups = defaultdict(list)
    for group in envoy.endpoints:
        if group.lb_endpoints:
            place = group.locality
            groups[group.priority, place.region, place.zone, place.sub_zone].append(group)
    priorities = sorted({priority for priority, *_ in groups})
    for (priority, region, zone, sub_zone), parts in sorted(groups.items()):
        made = result.endpoints.add(priority=priorities.index(priority))
        made.locality.SetInParent()
        made.locality.region, made.locality.zone = region, zone
        made.locality.sub_zone = sub_zone
        for part in parts:
            made.load_balancing_weight.value += part.load_balancing_weight.value or len(
                part.lb_endpoints
            )
            for entry in part.lb_endpoints:
                kept = made.lb_endpoints.add(health_status=entry.health_status)
                kept.endpoint.address.CopyFrom(entry.endpoint.address)
                if entry.load_balancing_weight.value:
                    kept.load_balancing_weight.CopyFrom(entry.load_balancing_weight)
    return result


def routes(envoy: RouteConfiguration, port: int) -> RouteConfiguration:
    """The routes that gRPC can follow. It is asked for an authority with its port in it."""
    result = RouteConfiguration(name=envoy.name)
    for host in envoy.virtual_hosts:
        made = result.virtual_hosts.add(name=host.name)
        for domain in host.domains:
            made.domains.append(domain)
            if domain != "*" and not domain.endswith(f":{port}"):
                made.domains.append(f"{domain}:{port}")
        for route in _drawn_anew(host.routes):
            made.routes.extend(_followed(route))
    return result


def _drawn_anew(
    envoy: Iterable[route_components_pb2.Route],
) -> Iterator[route_components_pb2.Route]:
    """Envoy compares a request's one random number with the fractions of all routes, so those of a
    rule's shares add up (`actions.py`). gRPC draws a new one for each route: the share of what is
    left."""
    rule, before = "", 0
    for route in envoy:
        own = route.name.rpartition("/")[0]
        if own != rule:
            rule, before = own, 0
        if route.match.HasField("runtime_fraction"):
            upto = route.match.runtime_fraction.default_value.numerator
            if before:
                anew = route_components_pb2.Route()
                anew.CopyFrom(route)
                share = (upto - before) * MILLION // (MILLION - before)
                anew.match.runtime_fraction.default_value.numerator = share
                route = anew
            before = upto
        yield route


def _followed(envoy: route_components_pb2.Route) -> Iterator[route_components_pb2.Route]:
    """The route, or two where Envoy has one; none where gRPC would never match.

    Redirects, and answers of the proxy's own, become calls that fail with UNAVAILABLE.
    """
    match = envoy.match
    if match.query_parameters:
        return
    result = route_components_pb2.Route(name=envoy.name)
    for header in match.headers:
        if header.name != ":method":
            result.match.headers.append(header)
        elif header.string_match.exact != "POST":
            # Every call is a POST.
            return
    if match.HasField("runtime_fraction"):
        result.match.runtime_fraction.CopyFrom(match.runtime_fraction)
    if match.HasField("case_sensitive"):
        result.match.case_sensitive.CopyFrom(match.case_sensitive)
    if envoy.HasField("route"):
        _act(envoy.route, result.route)
    match match.WhichOneof("path_specifier"):
        case "path_separated_prefix":
            exact = route_components_pb2.Route()
            exact.CopyFrom(result)
            exact.match.path = match.path_separated_prefix
            yield exact
            result.match.prefix = f"{match.path_separated_prefix}/"
        case "prefix":
            result.match.prefix = match.prefix
        case "path":
            result.match.path = match.path
        case "safe_regex":
            result.match.safe_regex.CopyFrom(match.safe_regex)
        case _:
            return
    yield result


def _act(envoy: route_components_pb2.RouteAction, result: route_components_pb2.RouteAction) -> None:
    if envoy.HasField("weighted_clusters"):
        for entry in envoy.weighted_clusters.clusters:
            kept = result.weighted_clusters.clusters.add(name=entry.name)
            kept.weight.CopyFrom(entry.weight)
    else:
        result.cluster = envoy.cluster
    if envoy.timeout.ToNanoseconds():
        result.max_stream_duration.max_stream_duration.CopyFrom(envoy.timeout)
    retried = [word for word in envoy.retry_policy.retry_on.split(",") if word in _RETRIED]
    if retried and envoy.retry_policy.num_retries.value:
        result.retry_policy.retry_on = ",".join(retried)
        result.retry_policy.num_retries.CopyFrom(envoy.retry_policy.num_retries)
        if envoy.retry_policy.retry_back_off.HasField("base_interval"):
            result.retry_policy.retry_back_off.CopyFrom(envoy.retry_policy.retry_back_off)
