"""Route configurations of service ports, in the order of precedence of the Gateway API."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from envoy.config.route.v3 import route_components_pb2, route_pb2

from xds_server.ir import (
    GrpcMatch,
    MatchKind,
    NamedMatch,
    Parent,
    Route,
    RouteMatch,
    RouteRule,
    StringMatch,
)
from xds_server.translate.actions import routes_of
from xds_server.translate.clusters import cluster_name
from xds_server.translate.listeners import catch_all
from xds_server.translate.messages import regex, string_matcher
from xds_server.translate.traffic import configure, faults, limit_as, limits

_PATH_RANK = {MatchKind.EXACT: 2, MatchKind.REGEX: 1, MatchKind.PREFIX: 0}


@dataclass(frozen=True)
class _Candidate:
    """One match of one rule of one route."""

    route: Route
    place: tuple[int, int]
    rule: RouteRule
    match: RouteMatch | GrpcMatch

    def precedence(self, hostname: str) -> tuple[object, ...]:
        """Smaller comes first (Gateway API, HTTPRouteRule.matches and GRPCRouteRule.matches): the
        longest host name, then what the match says, then the oldest route, its name, and its own
        order."""
        covering = max(_specificity(name) for name in _covering(self.route, hostname))
        created = self.route.created
        return (
            tuple(-part for part in covering),
            _rank(self.match),
            (created == "", created),
            self.route.name,
            self.place,
        )


def _rank(match: RouteMatch | GrpcMatch) -> tuple[int, ...]:
    """HTTP: exact path, then (the order left to us) regular expression before prefix, the longest
    of its kind, method, number of headers and of query parameters. gRPC: characters of the service,
    of the method, number of headers."""
    if isinstance(match, GrpcMatch):
        return (-_length(match.service), -_length(match.method), -len(match.headers))
    return (
        -_PATH_RANK[match.path.kind],
        -len(match.path.value),
        int(match.method is None),
        -len(match.headers),
        -len(match.queries),
    )


def _length(match: StringMatch | None) -> int:
    return len(match.value) if match else 0


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
    made = _configuration(
        name, [_virtual_host(hostname, candidates, parent.port) for hostname in sorted(hostnames)]
    )
    shared = {
        rule.limited_as: rule.rate_limit
        for route in routes
        for rule in route.rules
        if rule.rate_limit is not None
    }
    configure(made, limits(shared))
    return made


def _configuration(
    name: str, hosts: Iterable[route_components_pb2.VirtualHost]
) -> route_pb2.RouteConfiguration:
    result = route_pb2.RouteConfiguration(
        name=name, virtual_hosts=hosts, ignore_port_in_host_matching=True
    )
    result.validate_clusters.value = False
    return result


def _virtual_host(
    hostname: str, candidates: Iterable[_Candidate], port: int
) -> route_components_pb2.VirtualHost:
    """Envoy picks one virtual host and looks nowhere else, so each holds the routes of the wider
    host names, too."""
    chosen = sorted(
        (one for one in candidates if _covering(one.route, hostname)),
        key=lambda one: one.precedence(hostname),
    )
    return route_components_pb2.VirtualHost(
        name=hostname,
        domains=[hostname],
        routes=[route for one in chosen for route in _routes(one, port)],
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


def _routes(one: _Candidate, port: int) -> Iterator[route_components_pb2.Route]:
    name = f"{one.route.name}/{one.place[0]}/{one.place[1]}"
    path = _path(one.match)
    kind, fault = one.route.kind, faults(one.rule.fault)
    for route in routes_of(name, _match(one.match, path), path, one.rule, kind, port):
        configure(route, fault)
        if one.rule.rate_limit is not None:
            limit_as(route, one.rule.limited_as)
        yield route


def _path(match: RouteMatch | GrpcMatch) -> StringMatch:
    """A gRPC method is the path /SERVICE/METHOD (gRPC over HTTP2, "Requests")."""
    if isinstance(match, RouteMatch):
        return match.path
    service, method = match.service, match.method
    if service is None and method is None:
        return StringMatch(MatchKind.PREFIX, "/")
    if method is None and service is not None and service.kind is MatchKind.EXACT:
        return StringMatch(MatchKind.PREFIX, f"/{service.value}")
    if all(part is not None and part.kind is MatchKind.EXACT for part in (service, method)):
        assert service is not None
        assert method is not None
        return StringMatch(MatchKind.EXACT, f"/{service.value}/{method.value}")
    return StringMatch(MatchKind.REGEX, f"/{_expression(service)}/{_expression(method)}")


def _expression(part: StringMatch | None) -> str:
    if part is None:
        return "[^/]+"
    return f"(?:{part.value})" if part.kind is MatchKind.REGEX else re.escape(part.value)


def _match(match: RouteMatch | GrpcMatch, path: StringMatch) -> route_components_pb2.RouteMatch:
    result = route_components_pb2.RouteMatch()
    match path.kind:
        case MatchKind.EXACT:
            result.path = path.value
        case MatchKind.REGEX:
            result.safe_regex.CopyFrom(regex(path.value))
        case _ if path.value == "/":
            result.prefix = "/"
        case _:
            result.path_separated_prefix = path.value
    if isinstance(match, RouteMatch):
        if match.method is not None:
            result.headers.add(name=":method").string_match.exact = match.method
        for query in match.queries:
            result.query_parameters.add(name=query.name).string_match.CopyFrom(
                string_matcher(query.value)
            )
    _match_headers(match.headers, result)
    return result


def _match_headers(headers: Iterable[NamedMatch], result: route_components_pb2.RouteMatch) -> None:
    for header in headers:
        result.headers.add(name=header.name).string_match.CopyFrom(string_matcher(header.value))
