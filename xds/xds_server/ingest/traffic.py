"""What TrafficPolicies say (manifests/crds/trafficpolicies.yaml), field by field."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TypeVar

from xds_server.groups import GATEWAY_GROUP
from xds_server.ingest.access_logs import read_access_logs
from xds_server.ingest.reader import DNS_NAME, TOKEN, Field, Item
from xds_server.ir import (
    Abort,
    Balancing,
    CircuitBreaker,
    CookieHash,
    Delay,
    Fault,
    HashKey,
    HeaderHash,
    LoadBalancer,
    Name,
    Outliers,
    RateLimit,
    SourceHash,
    TrafficPolicy,
)

T = TypeVar("T")

#: What an HTTPRoute can be given, too: it knows requests, not endpoints.
ROUTE_PARTS = ("rateLimit", "faultInjection")
_PARTS = (
    *ROUTE_PARTS,
    "outlierDetection",
    "circuitBreaker",
    "loadBalancer",
    "connectionLimit",
    "accessLog",
)
_GROUPS = {"Service": "", "HTTPRoute": GATEWAY_GROUP, "GRPCRoute": GATEWAY_GROUP}
_MAX_TARGETS = 16
_MAX_KEYS = 8
_MOST = 2**31 - 1
_DAY = timedelta(days=1)
#: Envoy refuses token buckets that are filled more often.
_SHORTEST_FILL = timedelta(milliseconds=50)
_MILLISECOND = timedelta(milliseconds=1)
_SECTION = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_COOKIE_PATH = re.compile(r"/[\x21-\x3a\x3c-\x7e]*")


class _KeyType(StrEnum):
    HEADER = "Header"
    COOKIE = "Cookie"
    SOURCE = "SourceIP"


@dataclass(frozen=True, eq=False)
class Target:
    """What a policy is attached to; `section` is a port's or a rule's name, None is all."""

    field: Field
    kind: str
    name: Name
    section: str | None


@dataclass(frozen=True, eq=False)
class RawTraffic:
    """A policy, and what it wants to hold for; the places are not looked up yet."""

    item: Item
    policy: TrafficPolicy
    targets: tuple[Target, ...]


def read_traffic(item: Item) -> RawTraffic:
    spec = item.spec
    if not spec.present:
        spec.problem("is required; add it")
    spec.complete()
    spec.only("targetRefs", *_PARTS)
    if not any(spec[part].present for part in _PARTS):
        spec.problem(f"says nothing; add one of {', '.join(_PARTS)}")
    targets = _targets(item)
    if any(target.kind != "Service" for target in targets):
        for part in _PARTS:
            if part not in ROUTE_PARTS and spec[part].present:
                spec[part].problem(
                    f"holds for Services only; a route takes {' and '.join(ROUTE_PARTS)}"
                )
    limit = spec["connectionLimit"]
    limit.only("maxConnections")
    policy = TrafficPolicy(
        item.name,
        rate_limit=_given(spec["rateLimit"], _rate_limit),
        fault=_given(spec["faultInjection"], _fault),
        outliers=_given(spec["outlierDetection"], _outliers),
        breaker=_given(spec["circuitBreaker"], _breaker),
        balancer=_given(spec["loadBalancer"], _balancer),
        max_connections=(limit["maxConnections"].integer(1, _MOST) if limit.present else None),
        access_logs=read_access_logs(spec["accessLog"]),
    )
    return RawTraffic(item, policy, targets)


def _given(field: Field, read: Callable[[Field], T]) -> T | None:
    if not field.present:
        return None
    field.complete()
    return read(field)


def _targets(item: Item) -> tuple[Target, ...]:
    references = item.spec["targetRefs"]
    if not references.present:
        references.problem("is required; name a Service or an HTTPRoute")
    fields = references.filled("name a Service or an HTTPRoute")
    if len(fields) > _MAX_TARGETS:
        references.problem(f"must have at most {_MAX_TARGETS} entries; make it two policies")
    found: dict[tuple[str, Name, str | None], Target] = {}
    for field in fields:
        field.complete()
        field.only("group", "kind", "name", "sectionName")
        kind = field["kind"].text()
        group = _GROUPS.get(kind)
        if group is None:
            if field["kind"].present:
                field["kind"].problem(f"must be one of {', '.join(_GROUPS)}")
        elif field["group"].text("") != group:
            field["group"].problem(f"must be {group!r} for a {kind}")
        section = field["sectionName"]
        target = Target(
            field,
            kind,
            Name(item.name.namespace, field["name"].matching(DNS_NAME, "a name")),
            section.matching(_SECTION, "a port's or a rule's name") if section.present else None,
        )
        key = (kind, target.name, target.section)
        if key in found:
            field.problem("is given twice; remove one of them")
        found[key] = target
    return tuple(found.values())


def _rate_limit(field: Field) -> RateLimit:
    field.only("requests", "interval", "burst")
    requests = field["requests"].integer(1, _MOST)
    return RateLimit(
        requests,
        _time(field["interval"], _SHORTEST_FILL, _DAY, timedelta(seconds=1)),
        field["burst"].integer(1, _MOST, requests),
    )


def _fault(field: Field) -> Fault:
    field.only("delay", "abort")
    if not field["delay"].present and not field["abort"].present:
        field.problem("says nothing; add delay or abort")
    return Fault(_given(field["delay"], _delay), _given(field["abort"], _abort))


def _delay(field: Field) -> Delay:
    field.only("fixedDelay", "percentage")
    if not field["fixedDelay"].present:
        field["fixedDelay"].problem("is required; add it")
    return Delay(
        _time(field["fixedDelay"], _MILLISECOND, timedelta(hours=1), _MILLISECOND),
        _millionths(field["percentage"]),
    )


def _abort(field: Field) -> Abort:
    field.only("httpStatus", "grpcStatus", "percentage")
    http, grpc = field["httpStatus"], field["grpcStatus"]
    if http.present == grpc.present:
        field.problem("must have one of httpStatus and grpcStatus")
    return Abort(
        _millionths(field["percentage"]),
        http.integer(200, 599) if http.present else None,
        grpc.integer(0, 16) if grpc.present else None,
    )


def _outliers(field: Field) -> Outliers:
    field.only(
        "consecutive5xxErrors",
        "consecutiveGatewayErrors",
        "interval",
        "baseEjectionTime",
        "maxEjectionTime",
        "maxEjectionPercent",
    )
    errors, gateway = field["consecutive5xxErrors"], field["consecutiveGatewayErrors"]
    base = _time(field["baseEjectionTime"], _MILLISECOND, _DAY, timedelta(seconds=30))
    longest = _time(field["maxEjectionTime"], _MILLISECOND, _DAY, max(base, timedelta(minutes=5)))
    if longest < base:
        field["maxEjectionTime"].problem("must not be shorter than baseEjectionTime")
    only_gateway = gateway.present and not errors.present
    return Outliers(
        None if only_gateway else errors.integer(1, _MOST, 5),
        gateway.integer(1, _MOST) if gateway.present else None,
        _time(field["interval"], _MILLISECOND, _DAY, timedelta(seconds=10)),
        base,
        longest,
        field["maxEjectionPercent"].integer(0, 100, 10),
    )


def _breaker(field: Field) -> CircuitBreaker:
    names = ("maxConnections", "maxPendingRequests", "maxRequests", "maxRetries")
    field.only(*names)
    if field.value == {}:
        field.problem(f"says nothing; add one of {', '.join(names)}")
    return CircuitBreaker(
        *(field[name].integer(0, _MOST) if field[name].present else None for name in names)
    )


def _balancer(field: Field) -> LoadBalancer:
    field.only("type", "hashOn")
    if not field["type"].present:
        field["type"].problem("is required; add it")
    balancing = field["type"].choice(Balancing, Balancing.LEAST_REQUEST)
    keys = field["hashOn"]
    if balancing.hashes and not keys.present:
        keys.problem(f"is required by {balancing.value}; say what to hash")
    elif keys.present and not balancing.hashes:
        keys.problem(f"means nothing to {balancing.value}; remove it, or use RingHash or Maglev")
    entries = keys.filled("remove it, or say what to hash")
    if len(entries) > _MAX_KEYS:
        keys.problem(f"must have at most {_MAX_KEYS} entries")
    return LoadBalancer(balancing, tuple(map(_key, entries)))


def _key(field: Field) -> HashKey:
    field.complete()
    if not field["type"].present:
        field["type"].problem("is required; add it")
    match field["type"].choice(_KeyType, _KeyType.SOURCE):
        case _KeyType.HEADER:
            field.only("type", "header")
            return HeaderHash(field["header"].matching(TOKEN, "a header name").lower())
        case _KeyType.COOKIE:
            field.only("type", "cookie")
            cookie = field["cookie"]
            cookie.only("name", "ttl", "path")
            cookie.complete()
            ttl, path = cookie["ttl"], cookie["path"]
            if path.present and not ttl.present:
                path.problem("is for cookies that are given; add ttl (0s is the session)")
            return CookieHash(
                cookie["name"].matching(TOKEN, "a cookie's name"),
                _time(ttl, timedelta(0), timedelta(days=400), timedelta(0))
                if ttl.present
                else None,
                path.matching(_COOKIE_PATH, "a path such as /", ""),
            )
        case _KeyType.SOURCE:
            field.only("type")
            return SourceHash()


def _time(field: Field, low: timedelta, high: timedelta, default: timedelta) -> timedelta:
    value = field.duration()
    if value is None:
        return default
    if not low <= value <= high:
        field.problem(f"must be from {_said(low)} to {_said(high)}")
        return default
    return value


def _said(value: timedelta) -> str:
    """As a user would write it: `50ms`, `24h`."""
    milliseconds = value // _MILLISECOND
    for unit, size in (("h", 3_600_000), ("s", 1_000)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms"


def _millionths(field: Field) -> int:
    """A percentage, all when it is missing; Envoy counts millionths at the finest."""
    if not field.present:
        return 1_000_000
    value = field.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        field.problem("must be a number from 0 to 100")
        return 0
    return round(value * 10_000)
