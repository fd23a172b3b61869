"""Routes of requests."""

from dataclasses import dataclass
from datetime import timedelta

from xds_server.ir.limits import Fault, RateLimit
from xds_server.ir.matches import MatchKind, NamedMatch, StringMatch
from xds_server.ir.names import Name

EVERY_PATH = StringMatch(MatchKind.PREFIX, "/")


@dataclass(frozen=True)
class RouteMatch:
    """All parts must match; headers and query parameters are sorted by name."""

    path: StringMatch = EVERY_PATH
    method: str | None = None
    headers: tuple[NamedMatch, ...] = ()
    queries: tuple[NamedMatch, ...] = ()


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


@dataclass(frozen=True)
class Backend:
    """A service port that takes `weight` parts of a rule's requests; they fail where it is not
    `found` or not to be used."""

    service: Name
    port: int
    weight: int = 1
    headers: HeaderChanges = HeaderChanges()
    found: bool = True


@dataclass(frozen=True)
class RouteRule:
    """`timeout` bounds a request, `backend_timeout` one try of it; None or zero is no bound.
    `rate_limit` and `fault` are a traffic policy's, and each client's sidecar has them for itself;
    `name` is what a policy calls the rule, or empty."""

    matches: tuple[RouteMatch, ...]
    backends: tuple[Backend, ...]
    headers: HeaderChanges = HeaderChanges()
    timeout: timedelta | None = None
    backend_timeout: timedelta | None = None
    name: str = ""
    rate_limit: RateLimit | None = None
    fault: Fault | None = None


@dataclass(frozen=True, order=True)
class Parent:
    """A service port that a route is attached to."""

    service: Name
    port: int


@dataclass(frozen=True)
class Route:
    """`created` is RFC 3339 text or empty; without hostnames every authority matches."""

    name: Name
    created: str
    parents: tuple[Parent, ...]
    hostnames: tuple[str, ...]
    rules: tuple[RouteRule, ...]
