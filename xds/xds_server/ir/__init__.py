"""What a mesh is: services with their endpoints, workloads, routes, policies.

Everything is resolved here: references were followed, defaults applied, selectors turned into the
pods they select. Translating needs nothing else. Values are immutable; a Mesh is compared by
identity, so that what is derived from it can be kept with it cheaply.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from xds_server.conditions import ObjectStatus
from xds_server.ir.limits import Abort, Delay, Fault, RateLimit
from xds_server.ir.matches import MatchKind, NamedMatch, StringMatch
from xds_server.ir.names import INBOUND_PORT, OUTBOUND_PORT, Client, Name, NodeId, Protocol
from xds_server.ir.policies import Action, Operation, Policy, PolicyRule, Source
from xds_server.ir.routes import (
    ANY_ORIGIN,
    Backend,
    Cors,
    Filters,
    GrpcMatch,
    HeaderChange,
    HeaderChanges,
    Mirror,
    Parent,
    PathChange,
    PathPart,
    Redirect,
    Retry,
    Rewrite,
    Route,
    RouteKind,
    RouteMatch,
    RouteRule,
    protocols_of,
)
from xds_server.ir.services import (
    EVERYTHING,
    AppPort,
    Endpoint,
    Scope,
    Service,
    ServicePort,
    Workload,
)
from xds_server.ir.traffic import (
    AccessLog,
    Balancing,
    CircuitBreaker,
    CookieHash,
    HashKey,
    HeaderHash,
    LoadBalancer,
    LogFormat,
    Outliers,
    PodPort,
    SourceHash,
    TrafficPolicy,
)

__all__ = [
    "ANY_ORIGIN",
    "EVERYTHING",
    "INBOUND_PORT",
    "OUTBOUND_PORT",
    "Abort",
    "AccessLog",
    "Action",
    "AppPort",
    "Backend",
    "Balancing",
    "CircuitBreaker",
    "Client",
    "CookieHash",
    "Cors",
    "Delay",
    "Endpoint",
    "Fault",
    "Filters",
    "GrpcMatch",
    "HashKey",
    "HeaderChange",
    "HeaderChanges",
    "HeaderHash",
    "LoadBalancer",
    "LogFormat",
    "MatchKind",
    "Mesh",
    "Mirror",
    "Name",
    "NamedMatch",
    "NodeId",
    "Operation",
    "Outliers",
    "Parent",
    "PathChange",
    "PathPart",
    "PodPort",
    "Policy",
    "PolicyRule",
    "Protocol",
    "RateLimit",
    "Redirect",
    "Retry",
    "Rewrite",
    "Route",
    "RouteKind",
    "RouteMatch",
    "RouteRule",
    "Scope",
    "Service",
    "ServicePort",
    "Source",
    "SourceHash",
    "StringMatch",
    "TrafficPolicy",
    "Workload",
    "protocols_of",
]


@dataclass(frozen=True, eq=False)
class Mesh:
    """Everything known, in sorted order. `ignored` names objects that were of no use here,
    `kept` those that are bad now and stay as they were, `left_out` bad ones that never were good;
    `closed` says in whose place everything is refused. `statuses` tells what became of objects that
    have a status. Pods that are not known reach services only where `registry_only_in` says so of
    their namespace, else `registry_only`."""

    services: Mapping[Name, Service] = field(default_factory=dict)
    workloads: Mapping[Name, Workload] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    policies: tuple[Policy, ...] = ()
    traffic: tuple[TrafficPolicy, ...] = ()
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    registry_only: bool = False
    registry_only_in: Mapping[str, bool] = field(default_factory=dict)
    statuses: tuple[ObjectStatus, ...] = ()
