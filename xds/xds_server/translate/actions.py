"""What is done with the requests that a match of a rule takes, as Envoy's routes."""

import re
from collections.abc import Iterator, MutableSequence, Sequence
from datetime import timedelta
from typing import TypeAlias

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from envoy.type.matcher.v3 import regex_pb2
from envoy.type.v3 import percent_pb2

from xds_server.ir import (
    Backend,
    Filters,
    HeaderChange,
    HeaderChanges,
    Mirror,
    PathChange,
    PathPart,
    Retry,
    RouteKind,
    RouteRule,
    StringMatch,
)
from xds_server.translate.clusters import cluster_name
from xds_server.translate.cors import cors_config
from xds_server.translate.messages import NO_TIMEOUT, duration, header_option, regex
from xds_server.translate.traffic import configure

_DEFAULT_PORTS = {"http": 80, "https": 443}
#: The status of what cannot be forwarded. Envoy tells gRPC clients UNAVAILABLE for a 503.
_FAILED = {RouteKind.HTTP: 500, RouteKind.GRPC: 503}
#: Fractions of requests are told in parts of this.
MILLION = 1_000_000
#: Longer only if that is what is asked for.
_LONGEST_BACKOFF = timedelta(hours=1)
#: No answer: not connected, refused by HTTP/2 or gRPC, or the connection was lost, or it took too
#: long, which the Gateway API counts alike (HTTPRouteRetry).
_UNANSWERED = ("connect-failure", "refused-stream", "unavailable", "reset")

Action: TypeAlias = route_components_pb2.RouteAction
MirrorPolicy: TypeAlias = route_components_pb2.RouteAction.RequestMirrorPolicy
EnvoyMatch: TypeAlias = route_components_pb2.RouteMatch
EnvoyRoute: TypeAlias = route_components_pb2.Route
ClusterWeight: TypeAlias = route_components_pb2.WeightedCluster.ClusterWeight


def routes_of(
    name: str,
    match: EnvoyMatch,
    path: StringMatch,
    rule: RouteRule,
    kind: RouteKind,
    port: int,
) -> Iterator[EnvoyRoute]:
    """The routes of one match of a rule, in their order. `path` is what the match says of paths,
    `port` the number of the service port that they are for."""
    backends = [backend for backend in rule.backends if backend.weight > 0]
    if rule.broken:
        yield _failing(name, match, Filters(), kind)
    elif rule.filters.redirect:
        yield _redirecting(name, match, rule.filters, path, port)
    elif not any(backend.found for backend in backends):
        yield _failing(name, match, rule.filters, kind)
    elif len(backends) > 1 and all(map(_is_plain, backends)):
        yield _split(name, match, path, rule, backends)
    else:
        yield from _one_by_one(name, match, path, rule, backends, kind, port)


def _is_plain(backend: Backend) -> bool:
    """Its share differs from others by cluster, headers and host only."""
    filters = backend.filters
    return backend.found and not (
        filters.redirect or filters.rewrite.path or filters.mirrors or filters.cors
    )


def _route(name: str, match: EnvoyMatch, filters: Filters) -> EnvoyRoute:
    result = EnvoyRoute(name=name, match=match)
    configure(result, cors_config(filters.cors))
    return result


def _failing(name: str, match: EnvoyMatch, filters: Filters, kind: RouteKind) -> EnvoyRoute:
    result = _route(name, match, filters)
    result.direct_response.status = _FAILED[kind]
    _change(filters.headers, result)
    return result


def _redirecting(
    name: str, match: EnvoyMatch, filters: Filters, path: StringMatch, port: int
) -> EnvoyRoute:
    redirect = filters.redirect
    assert redirect is not None
    result = _route(name, match, filters)
    action = result.redirect
    action.response_code = _status_name(redirect.status)
    if redirect.scheme:
        action.scheme_redirect = redirect.scheme
    action.host_redirect = redirect.hostname or ""
    if redirect.path is not None:
        _replace(action, redirect.path, path)
    scheme = redirect.scheme or "http"
    told = redirect.port or (_DEFAULT_PORTS[scheme] if redirect.scheme else port)
    if told != _DEFAULT_PORTS[scheme]:
        action.port_redirect = told
    elif not redirect.hostname:
        result.response_headers_to_add.append(_location(scheme))
    _change(filters.headers, result)
    return result


def _status_name(status: int) -> route_components_pb2.RedirectAction.RedirectResponseCode:
    codes = route_components_pb2.RedirectAction.RedirectResponseCode
    return {
        301: codes.MOVED_PERMANENTLY,
        302: codes.FOUND,
        303: codes.SEE_OTHER,
        307: codes.TEMPORARY_REDIRECT,
        308: codes.PERMANENT_REDIRECT,
    }[status]


def _location(scheme: str) -> base_pb2.HeaderValueOption:
    """The host as asked for, but without its port, which a redirect of Envoy's keeps."""
    host = r"%CEL(re.extract(request.host, '^(.*?)(:[0-9]+)?$', '\\1'))%"
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key="location", value=f"{scheme}://{host}%PATH(WQ:PATH)%"),
        append_action=base_pb2.HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _split(
    name: str, match: EnvoyMatch, path: StringMatch, rule: RouteRule, backends: Sequence[Backend]
) -> EnvoyRoute:
    result = _route(name, match, rule.filters)
    _forward(result.route, rule, rule.filters, path)
    each_its_own = any(backend.filters.headers for backend in backends)
    if not each_its_own:
        _change(rule.filters.headers, result)
    for backend in backends:
        cluster = result.route.weighted_clusters.clusters.add()
        cluster.name = cluster_name(backend.service, backend.port)
        cluster.weight.value = backend.weight
        if backend.filters.rewrite.hostname:
            cluster.host_rewrite_literal = backend.filters.rewrite.hostname
        if each_its_own:
            # Envoy changes a backend's headers first and the route's on top of them; the Gateway
            # API has it the other way round.
            _change(rule.filters.headers.then(backend.filters.headers), cluster)
    return result


def _one_by_one(
    name: str,
    match: EnvoyMatch,
    path: StringMatch,
    rule: RouteRule,
    backends: Sequence[Backend],
    kind: RouteKind,
    port: int,
) -> Iterator[EnvoyRoute]:
    """A route for each backend. Envoy compares a request's one random number with the share of each
    route that it comes to, so shares add up from route to route; the last one takes the rest."""
    total = sum(backend.weight for backend in backends)
    taken = 0
    for number, backend in enumerate(backends):
        taken += backend.weight
        share = EnvoyMatch()
        share.CopyFrom(match)
        if taken < total:
            share.runtime_fraction.default_value.CopyFrom(_fraction(taken * MILLION // total))
        own = f"{name}/{number}" if len(backends) > 1 else name
        filters = rule.filters.then(backend.filters)
        if not backend.found:
            yield _failing(own, share, rule.filters, kind)
        elif filters.redirect:
            yield _redirecting(own, share, filters, path, port)
        else:
            result = _route(own, share, filters)
            _forward(result.route, rule, filters, path)
            result.route.cluster = cluster_name(backend.service, backend.port)
            _change(filters.headers, result)
            yield result


def _forward(action: Action, rule: RouteRule, filters: Filters, path: StringMatch) -> None:
    """All of the action but where to."""
    action.timeout.CopyFrom(duration(rule.timeout) if rule.timeout else NO_TIMEOUT)
    if rule.backend_timeout or rule.retry:
        action.retry_policy.CopyFrom(_retry_policy(rule.retry, rule.backend_timeout))
    if filters.rewrite.hostname:
        action.host_rewrite_literal = filters.rewrite.hostname
    if filters.rewrite.path is not None:
        _replace(action, filters.rewrite.path, path)
    for mirror in filters.mirrors:
        if mirror.per_million:
            action.request_mirror_policies.append(_mirror(mirror))


def _retry_policy(retry: Retry | None, each: timedelta | None) -> route_components_pb2.RetryPolicy:
    result = route_components_pb2.RetryPolicy()
    if each:
        result.per_try_timeout.CopyFrom(duration(each))
    # Envoy tries once more if it is not told how often.
    result.num_retries.value = retry.attempts if retry else 0
    if retry is None or not retry.attempts:
        return result
    conditions = list(_UNANSWERED)
    if retry.codes:
        conditions.append("retriable-status-codes")
        result.retriable_status_codes.extend(retry.codes)
    result.retry_on = ",".join(conditions)
    if retry.backoff is not None:
        base = max(retry.backoff, timedelta(milliseconds=1))
        result.retry_back_off.base_interval.CopyFrom(duration(base))
        most = max(base, min(base * 10, _LONGEST_BACKOFF))
        result.retry_back_off.max_interval.CopyFrom(duration(most))
    # Another endpoint, if there is one.
    elsewhere = result.retry_host_predicate.add(name="envoy.retry_host_predicates.previous_hosts")
    elsewhere.typed_config.Pack(previous_hosts_pb2.PreviousHostsPredicate())
    result.host_selection_retry_max_attempts = 5
    return result


def _mirror(mirror: Mirror) -> MirrorPolicy:
    result = MirrorPolicy(
        cluster=cluster_name(mirror.service, mirror.port), disable_shadow_host_suffix_append=True
    )
    result.runtime_fraction.default_value.CopyFrom(_fraction(mirror.per_million))
    return result


def _fraction(per_million: int) -> percent_pb2.FractionalPercent:
    return percent_pb2.FractionalPercent(
        numerator=per_million, denominator=percent_pb2.FractionalPercent.DenominatorType.MILLION
    )


def _replace(
    action: Action | route_components_pb2.RedirectAction, change: PathChange, path: StringMatch
) -> None:
    """Redirects and rewrites change paths by the same fields."""
    match change.part:
        case PathPart.FULL:
            action.regex_rewrite.CopyFrom(_substitution("^.*$", change.value))
        case PathPart.PREFIX if path.value == "/":
            action.prefix_rewrite = f"{change.value}/"
        case PathPart.PREFIX if change.value:
            action.prefix_rewrite = change.value
        case PathPart.PREFIX:
            # To put "/" for "/a" would make "//b" of "/a/b", and to put nothing no path of "/a".
            action.regex_rewrite.CopyFrom(_substitution(f"^{re.escape(path.value)}/*", "/"))


def _substitution(pattern: str, value: str) -> regex_pb2.RegexMatchAndSubstitute:
    return regex_pb2.RegexMatchAndSubstitute(
        pattern=regex(pattern), substitution=value.replace("\\", "\\\\")
    )


def _change(changes: HeaderChanges, message: EnvoyRoute | ClusterWeight) -> None:
    _options(changes.request, message.request_headers_to_add)
    _options(changes.response, message.response_headers_to_add)
    message.request_headers_to_remove.extend(changes.request.remove)
    message.response_headers_to_remove.extend(changes.response.remove)


def _options(change: HeaderChange, add: MutableSequence[base_pb2.HeaderValueOption]) -> None:
    add.extend(header_option(name, value, append=False) for name, value in change.set)
    add.extend(header_option(name, value, append=True) for name, value in change.add)
