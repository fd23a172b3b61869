"""What may keep a request from its answer: a limit, or a fault that is wanted."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class RateLimit:
    """`requests` in each `interval`, and up to `burst` at once after quiet."""

    requests: int
    interval: timedelta
    burst: int


@dataclass(frozen=True)
class Delay:
    """`parts` of a million requests wait for `time`."""

    time: timedelta
    parts: int


@dataclass(frozen=True)
class Abort:
    """`parts` of a million requests are answered with a status, of HTTP or of gRPC."""

    parts: int
    http: int | None = None
    grpc: int | None = None


@dataclass(frozen=True)
class Fault:
    """At least one of both."""

    delay: Delay | None = None
    abort: Abort | None = None
