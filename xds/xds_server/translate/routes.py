"""Route configurations of service ports, in the order of precedence of the Gateway API."""

from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2

from xds_server.ir import (
    Backend,
    HeaderChange,
    HeaderChanges,
    MatchKind,
    Parent,
    Route,
    RouteMatch,
    RouteRule,
)
from xds_server.translate.clusters import BLACKHOLE, cluster_name
from xds_server.translate.listeners import catch_all
from xds_server.translate.messages import (
    NO_TIMEOUT,
    duration,
    header_option,
    regex,
    string_matcher,
)
from xds_server.translate.traffic import configure, for_requests

_PATH_RANK = {MatchKind.EXACT: 2, MatchKind.REGEX: 1, MatchKind.PREFIX: 0}


@dataclass(frozen=True)
class _Candidate:
    """One match of one rule of one route."""

    route: Route
    place: tuple[int, int]
    rule: RouteRule
    match: RouteMatch

    def precedence(self, hostname: str) -> tuple[object, ...]:
        """Smaller comes first (Gateway API, HTTPRouteRule.matches): the longest host name, then
        exact path, then (the order left to us) regular expression before prefix, the longest of its
        kind, method, number of headers and of query parameters, the oldest route, its name, and its
        own order."""
        covering = max(_specificity(name) for name in _covering(self.route, hostname))
        path = self.match.path
        created = self.route.created
        return (
            tuple(-part for part in covering),
            -_PATH_RANK[path.kind],
            -len(path.value),
            self.match.method is None,
            -len(self.match.headers),
            -len(self.match.queries),
            (created == "", created),
            self.route.name,
            self.place,
        )


def route_configuration(parent: Parent, routes: Sequence[Route]) -> route_pb2.RouteConfiguration:
    """The routes of one service port: without any, every request goes to the service's endpoints;
    with some, what they do not match is answered with 404."""
    name = cluster_name(parent.service, parent.port)
    if not routes:
        everything = route_components_pb2.VirtualHost(
            name="*", domains=["*"], routes=[catch_all(name)]
        )
        return _configuration(name, [everything])
    candidates = [
        _Candidate(route, (number, place), rule, match)
        for route in routes
        for number, rule in enumerate(route.rules)
        for place, match in enumerate(rule.matches)
    ]
    hostnames = {hostname for route in routes for hostname in route.hostnames or ("*",)}
    return _configuration(
        name, [_virtual_host(hostname, candidates) for hostname in sorted(hostnames)]
    )


def _configuration(
    name: str, hosts: Iterable[route_components_pb2.VirtualHost]
) -> route_pb2.RouteConfiguration:
    result = route_pb2.RouteConfiguration(
        name=name, virtual_hosts=hosts, ignore_port_in_host_matching=True
    )
    result.validate_clusters.value = False
    return result


def _virtual_host(
    hostname: str, candidates: Iterable[_Candidate]
) -> route_components_pb2.VirtualHost:
    """Envoy picks one virtual host and looks nowhere else, so each holds the routes of the wider
    host names, too."""
    chosen = sorted(
        (one for one in candidates if _covering(one.route, hostname)),
        key=lambda one: one.precedence(hostname),
    )
    return route_components_pb2.VirtualHost(
        name=hostname, domains=[hostname], routes=[_route(one) for one in chosen]
    )


def _covering(route: Route, hostname: str) -> list[str]:
    """The route's host names that match all that `hostname` does."""
    return [
        name
        for name in route.hostnames or ("*",)
        if name in ("*", hostname) or (name.startswith("*.") and hostname.endswith(name[1:]))
    ]


def _specificity(hostname: str) -> tuple[int, int]:
    exact = not hostname.startswith("*")
    return (int(exact), len(hostname.removeprefix("*")))


def _route(one: _Candidate) -> route_components_pb2.Route:
    rule = one.rule
    result = route_components_pb2.Route(
        name=f"{one.route.name}/{one.place[0]}/{one.place[1]}", match=_match(one.match)
    )
    configure(result, for_requests(rule.fault, rule.rate_limit))
    backends = [backend for backend in rule.backends if backend.weight > 0]
    if not any(backend.found for backend in backends):
        result.direct_response.status = 500
        _change(rule.headers, result)
        return result
    action = result.route
    action.timeout.CopyFrom(duration(rule.timeout) if rule.timeout else NO_TIMEOUT)
    if rule.backend_timeout:
        # One try, since nothing is tried again: but the bound of a try is Envoy's retry policy's.
        action.retry_policy.num_retries.value = 0
        action.retry_policy.per_try_timeout.CopyFrom(duration(rule.backend_timeout))
    each_its_own = any(backend.headers for backend in backends)
    if not each_its_own:
        _change(rule.headers, result)
    if len(backends) == 1 and not each_its_own:
        action.cluster = _cluster(backends[0])
        return result
    for backend in backends:
        cluster = action.weighted_clusters.clusters.add()
        cluster.name = _cluster(backend)
        cluster.weight.value = backend.weight
        if each_its_own:
            # Envoy changes a backend's headers first and the route's on top of them; the Gateway
            # API has it the other way round.
            _change(rule.headers.then(backend.headers), cluster)
    return result


def _cluster(backend: Backend) -> str:
    return cluster_name(backend.service, backend.port) if backend.found else BLACKHOLE


_Changed: TypeAlias = (
    route_components_pb2.Route | route_components_pb2.WeightedCluster.ClusterWeight
)


def _change(changes: HeaderChanges, message: _Changed) -> None:
    _options(changes.request, message.request_headers_to_add)
    _options(changes.response, message.response_headers_to_add)
    message.request_headers_to_remove.extend(changes.request.remove)
    message.response_headers_to_remove.extend(changes.response.remove)


def _options(change: HeaderChange, add: MutableSequence[base_pb2.HeaderValueOption]) -> None:
    add.extend(header_option(name, value, append=False) for name, value in change.set)
    add.extend(header_option(name, value, append=True) for name, value in change.add)


def _match(match: RouteMatch) -> route_components_pb2.RouteMatch:
    result = route_components_pb2.RouteMatch()
    path = match.path
    match path.kind:
        case MatchKind.EXACT:
            result.path = path.value
        case MatchKind.REGEX:
            result.safe_regex.CopyFrom(regex(path.value))
        case _ if path.value == "/":
            result.prefix = "/"
        case _:
            result.path_separated_prefix = path.value
    if match.method is not None:
        result.headers.add(name=":method").string_match.exact = match.method
    for header in match.headers:
        result.headers.add(name=header.name).string_match.CopyFrom(string_matcher(header.value))
    for query in match.queries:
        result.query_parameters.add(name=query.name).string_match.CopyFrom(
            string_matcher(query.value)
        )
    return result
