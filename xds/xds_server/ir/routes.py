"""Routes of requests."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import NamedTuple

from xds_server.ir.limits import Fault, RateLimit
from xds_server.ir.matches import MatchKind, NamedMatch, StringMatch
from xds_server.ir.names import Name, Protocol

EVERY_PATH = StringMatch(MatchKind.PREFIX, "/")


@dataclass(frozen=True)
class RouteMatch:
    """All parts must match; headers and query parameters are sorted by name."""

    path: StringMatch = EVERY_PATH
    method: str | None = None
    headers: tuple[NamedMatch, ...] = ()
    queries: tuple[NamedMatch, ...] = ()


@dataclass(frozen=True)
class GrpcMatch:
    """All parts must match; a part that is None matches everything. A regex is RE2 and matches the
    whole service or method."""

    service: StringMatch | None = None
    method: StringMatch | None = None
    headers: tuple[NamedMatch, ...] = ()


@dataclass(frozen=True)
class HeaderChange:
    """Name and value pairs, in the order given."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.set or self.add or self.remove)

    def then(self, later: "HeaderChange") -> "HeaderChange":
        """The one change that does what this one and then `later` do."""
        lost = {name.lower() for name in (*later.remove, *(name for name, _ in later.set))}

        def left(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
            return tuple((name, value) for name, value in pairs if name.lower() not in lost)

        return HeaderChange(
            left(self.set) + later.set, left(self.add) + later.add, self.remove + later.remove
        )


@dataclass(frozen=True)
class HeaderChanges:
    """What is done to a request on its way there and to the response on its way back."""

    request: HeaderChange = HeaderChange()
    response: HeaderChange = HeaderChange()

    def __bool__(self) -> bool:
        return bool(self.request or self.response)

    def then(self, later: "HeaderChanges") -> "HeaderChanges":
        return HeaderChanges(self.request.then(later.request), self.response.then(later.response))


class PathPart(StrEnum):
    """What of a path is replaced: all of it, or the prefix that the match named."""

    FULL = "full"
    PREFIX = "prefix"


@dataclass(frozen=True)
class PathChange:
    """The query stays. `value` of a FULL path begins with /; of a PREFIX it has no / at its end."""

    part: PathPart
    value: str


@dataclass(frozen=True)
class Redirect:
    """An answer that sends the client elsewhere; None leaves a part of the URL as it was asked for
    (without a port: the scheme's, or without a scheme the service's)."""

    scheme: str | None = None
    hostname: str | None = None
    port: int | None = None
    path: PathChange | None = None
    status: int = 302


@dataclass(frozen=True)
class Rewrite:
    """What the backend is asked instead; None leaves a part as it was."""

    hostname: str | None = None
    path: PathChange | None = None


@dataclass(frozen=True)
class Mirror:
    """A service port that is sent a copy of `per_million` of a million requests."""

    service: Name
    port: int
    per_million: int = 1_000_000


#: Matches every origin.
ANY_ORIGIN = StringMatch(MatchKind.REGEX, ".*")


@dataclass(frozen=True)
class Cors:
    """Which scripts of other origins may ask, what, and read what of the answer; "*" in a list is
    everything. Browsers remember it for `max_age_s`."""

    origins: tuple[StringMatch, ...]
    credentials: bool = False
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    exposed: tuple[str, ...] = ()
    max_age_s: int = 5


@dataclass(frozen=True)
class Filters:
    """What is done to requests and their responses. With a redirect, nothing else but the
    response's headers counts."""

    headers: HeaderChanges = HeaderChanges()
    redirect: Redirect | None = None
    rewrite: Rewrite = Rewrite()
    mirrors: tuple[Mirror, ...] = ()
    cors: Cors | None = None

    def then(self, later: "Filters") -> "Filters":
        """First these, then `later`, which sees what these left."""
        return Filters(
            self.headers.then(later.headers),
            self.redirect or later.redirect,
            Rewrite(
                later.rewrite.hostname or self.rewrite.hostname,
                later.rewrite.path or self.rewrite.path,
            ),
            self.mirrors + later.mirrors,
            later.cors or self.cors,
        )


@dataclass(frozen=True)
class Backend:
    """A service port that takes `weight` parts of a rule's requests; they fail where it was not
    `found` or may not be used."""

    service: Name
    port: int
    weight: int = 1
    filters: Filters = Filters()
    found: bool = True


@dataclass(frozen=True)
class Retry:
    """A request that is not answered is tried again up to `attempts` times, and so is one that is
    answered with one of the codes; about `backoff` apart (None: Envoy's default)."""

    attempts: int
    codes: tuple[int, ...] = ()
    backoff: timedelta | None = None


@dataclass(frozen=True)
class RouteRule:
    """`timeout` bounds a request, `backend_timeout` one try of it; None or zero is no bound. A
    `broken` rule takes the requests that match and fails them. `rate_limit` and `fault` are a
    traffic policy's, and each client's sidecar has them for itself; rules that are `limited_as` the
    same share one limit. `name` is what a policy calls the rule, or empty."""

    matches: tuple[RouteMatch | GrpcMatch, ...]
    backends: tuple[Backend, ...]
    filters: Filters = Filters()
    timeout: timedelta | None = None
    backend_timeout: timedelta | None = None
    retry: Retry | None = None
    broken: bool = False
    name: str = ""
    rate_limit: RateLimit | None = None
    limited_as: str = ""
    fault: Fault | None = None

    @property
    def destinations(self) -> Iterator[tuple[Name, int]]:
        """The service ports that requests, or copies of them, may go to."""
        if self.broken:
            return
        for backend in self.backends:
            if backend.found:
                yield backend.service, backend.port
        for filters in (self.filters, *(backend.filters for backend in self.backends)):
            for mirror in filters.mirrors:
                yield mirror.service, mirror.port


class Parent(NamedTuple):
    """A service port that a route is attached to."""

    service: Name
    port: int


class RouteKind(StrEnum):
    """Routes of different kinds are never merged."""

    HTTP = "HTTPRoute"
    GRPC = "GRPCRoute"


@dataclass(frozen=True)
class Route:
    """`created` is RFC 3339 text or empty; without hostnames every authority matches."""

    name: Name
    created: str
    parents: tuple[Parent, ...]
    hostnames: tuple[str, ...]
    rules: tuple[RouteRule, ...]
    kind: RouteKind = RouteKind.HTTP

    @property
    def own_parents(self) -> tuple[Parent, ...]:
        """Those of its own namespace. Under the others it is for clients of its namespace only."""
        return tuple(p for p in self.parents if p.service.namespace == self.name.namespace)


def protocols_of(
    routes: Iterable[Route], consumer: str | None = None
) -> frozenset[tuple[Parent, Protocol]]:
    """What routes say of service ports: to everybody, or what those of the namespace `consumer` say
    to its clients. A GRPCRoute speaks of its backends, too, which HTTP/1.1 would be no use to.

    A route in another namespace than the service says nothing to everybody, or who may write routes
    somewhere could have anybody's database spoken to in HTTP."""
    found: dict[Parent, Protocol] = {}
    for route in routes:
        if consumer is None:
            parents, led = route.own_parents, bool(route.own_parents)
        elif route.name.namespace == consumer:
            parents, led = route.parents, True
        else:
            continue
        if route.kind is RouteKind.HTTP:
            for parent in parents:
                found.setdefault(parent, Protocol.HTTP)
            continue
        found |= dict.fromkeys(parents, Protocol.HTTP2)
        for rule in route.rules:
            for service, port in rule.destinations:
                if led or service.namespace == route.name.namespace:
                    found[Parent(service, port)] = Protocol.HTTP2
    return frozenset(found.items())
