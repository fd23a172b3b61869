"""How much traffic, how fast, to which endpoint, and what is told of it: traffic policies.

An absent part (None, or empty) leaves Envoy's way, or ours, as it is.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from xds_server.ir.limits import Fault, RateLimit
from xds_server.ir.names import Name
from xds_server.ir.routes import Parent


@dataclass(frozen=True)
class Outliers:
    """When an endpoint is left out for a while; None does not count that kind of failure."""

    consecutive_5xx: int | None
    consecutive_gateway_errors: int | None
    interval: timedelta
    base_ejection_time: timedelta
    max_ejection_time: timedelta
    max_ejection_percent: int


@dataclass(frozen=True)
class CircuitBreaker:
    """Bounds of one client's sidecar for the endpoints of a service port together."""

    max_connections: int | None = None
    max_pending_requests: int | None = None
    max_requests: int | None = None
    max_retries: int | None = None


class Balancing(StrEnum):
    """How an endpoint is chosen."""

    ROUND_ROBIN = "RoundRobin"
    LEAST_REQUEST = "LeastRequest"
    RANDOM = "Random"
    RING_HASH = "RingHash"
    MAGLEV = "Maglev"

    @property
    def hashes(self) -> bool:
        return self in (Balancing.RING_HASH, Balancing.MAGLEV)


@dataclass(frozen=True)
class HeaderHash:
    """By the values of a header (name in lower case)."""

    name: str


@dataclass(frozen=True)
class CookieHash:
    """By a cookie. Who has none is given one that lasts for `ttl` (zero: the session) under `path`;
    with `ttl` None nobody is given one."""

    name: str
    ttl: timedelta | None = None
    path: str = ""


@dataclass(frozen=True)
class SourceHash:
    """By the client's address."""


HashKey = HeaderHash | CookieHash | SourceHash


@dataclass(frozen=True)
class LoadBalancer:
    """`keys` are there for what hashes, and only for that; all that a request has of them count."""

    balancing: Balancing
    keys: tuple[HashKey, ...] = ()


class LogFormat(StrEnum):
    """How a line of an access log is written."""

    TEXT = "Text"
    JSON = "JSON"


@dataclass(frozen=True)
class AccessLog:
    """To a file, or to the sidecar's own output (`path` None). `fields` make up a JSON line, `text`
    another (None is Envoy's own default); statuses from `min_status` to `max_status` only."""

    path: str | None = None
    text: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    min_status: int | None = None
    max_status: int | None = None


@dataclass(frozen=True, order=True)
class PodPort:
    """A port of a pod's application."""

    pod: Name
    port: int


@dataclass(frozen=True)
class TrafficPolicy:
    """No two policies of a mesh hold for the same place: conflicts were decided.

    `services` are the service ports whose clients it holds for, `pods` the places behind them,
    where requests arrive. What it says of a route's rules is with these.
    """

    name: Name
    services: frozenset[Parent] = frozenset()
    pods: frozenset[PodPort] = frozenset()
    rate_limit: RateLimit | None = None
    fault: Fault | None = None
    outliers: Outliers | None = None
    breaker: CircuitBreaker | None = None
    balancer: LoadBalancer | None = None
    max_connections: int | None = None
    access_logs: tuple[AccessLog, ...] = ()

    @property
    def arrives(self) -> bool:
        """Whether it asks something of the pods where traffic arrives."""
        return bool(self.rate_limit or self.max_connections or self.access_logs)
