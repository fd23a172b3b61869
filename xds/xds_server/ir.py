"""What a mesh is: services with their endpoints, workloads, routes, policies.

Everything is resolved here: references were followed, defaults applied, selectors turned into the
pods they select. Translating needs nothing else. Values are immutable; a Mesh is compared by
identity, so that what is derived from it can be kept with it cheaply.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from ipaddress import ip_address

from redirector.errors import InputError
from redirector.model import IPAddress, IPNetwork
from xds_server.conditions import ObjectStatus

#: The sidecar's own listeners (names and numbers follow Istio's).
OUTBOUND_PORT = 15001
INBOUND_PORT = 15006


class Protocol(StrEnum):
    """What Envoy must understand of a port's traffic."""

    HTTP = "http"
    HTTP2 = "http2"
    TCP = "tcp"

    @property
    def is_http(self) -> bool:
        return self is not Protocol.TCP


@dataclass(frozen=True, order=True)
class Name:
    """A namespaced object's name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


_NODE_ID = re.compile(
    r"sidecar~(?P<ip>[^~]*)~(?P<pod>[^~]+)\.(?P<namespace>[^~.]+)~(?P=namespace)\.svc\.[^~]+"
)


@dataclass(frozen=True, order=True)
class NodeId:
    """Who a sidecar says it is."""

    ip: str
    pod: str
    namespace: str

    @classmethod
    def parse(cls, text: str) -> "NodeId":
        """Reads `sidecar~10.0.0.1~web-v1.demo~demo.svc.cluster.local` (Istio's form); InputError
        otherwise."""
        found = _NODE_ID.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            return cls(str(ip_address(found["ip"])), found["pod"], found["namespace"])
        except ValueError:
            raise InputError(
                f"node id {text[:200]!r}: must look like "
                "'sidecar~10.0.0.1~POD.NAMESPACE~NAMESPACE.svc.cluster.local'"
            ) from None


@dataclass(frozen=True, order=True)
class Endpoint:
    """A place that serves a port of a service."""

    address: IPAddress
    port: int


@dataclass(frozen=True)
class ServicePort:
    """A TCP port of a service; `endpoints` are those that traffic may go to now, sorted."""

    number: int
    protocol: Protocol
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True)
class Service:
    """`addresses` are its cluster IPs; a headless service has none."""

    name: Name
    addresses: tuple[IPAddress, ...]
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True)
class AppPort:
    """A port that a pod's application listens on."""

    number: int
    protocol: Protocol


@dataclass(frozen=True)
class Workload:
    """A pod that runs or is about to."""

    name: Name
    addresses: tuple[IPAddress, ...] = ()
    ports: tuple[AppPort, ...] = ()


class MatchKind(StrEnum):
    """How a value is compared; a path's PREFIX counts whole segments in routes, characters in
    policies, as their specifications have it."""

    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    REGEX = "regex"


@dataclass(frozen=True, order=True)
class StringMatch:
    """A regex is RE2 and matches the whole value."""

    kind: MatchKind
    value: str


@dataclass(frozen=True, order=True)
class NamedMatch:
    """A header (name in lower case) or a query parameter."""

    name: str
    value: StringMatch


@dataclass(frozen=True)
class RouteMatch:
    """All parts must match; headers and query parameters are sorted by name."""

    path: StringMatch = StringMatch(MatchKind.PREFIX, "/")
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
    """A service port that takes `weight` parts of a rule's requests."""

    service: Name
    port: int
    weight: int = 1
    headers: HeaderChanges = HeaderChanges()


@dataclass(frozen=True)
class RouteRule:
    """`timeout` bounds a request, `backend_timeout` one try of it; None or zero is no bound."""

    matches: tuple[RouteMatch, ...]
    backends: tuple[Backend, ...]
    headers: HeaderChanges = HeaderChanges()
    timeout: timedelta | None = None
    backend_timeout: timedelta | None = None


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


class Action(StrEnum):
    """What a policy does with a request that one of its rules matches."""

    ALLOW = "ALLOW"
    DENY = "DENY"


@dataclass(frozen=True)
class Source:
    """A peer's address must lie in one network of *each* group; an empty group matches nobody."""

    groups: tuple[tuple[IPNetwork, ...], ...]


@dataclass(frozen=True)
class Operation:
    """An empty part matches everything. Ports are the pod's, not a service's."""

    methods: tuple[str, ...] = ()
    paths: tuple[StringMatch, ...] = ()
    hosts: tuple[StringMatch, ...] = ()
    ports: tuple[int, ...] = ()

    @property
    def needs_http(self) -> bool:
        return bool(self.methods or self.paths or self.hosts)


@dataclass(frozen=True)
class PolicyRule:
    """One of the sources, one of the operations, and all of the headers must match; no source or
    no operation given matches everything."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()
    headers: tuple[NamedMatch, ...] = ()


@dataclass(frozen=True)
class Policy:
    """`targets` are the pods it holds for; None is every pod of its namespace."""

    name: Name
    action: Action
    targets: frozenset[Name] | None
    rules: tuple[PolicyRule, ...]

    @property
    def judges_paths(self) -> bool:
        return any(operation.paths for rule in self.rules for operation in rule.operations)


@dataclass(frozen=True, eq=False)
class Mesh:
    """Everything known, in sorted order. `ignored` names objects that were of no use here,
    `statuses` tells what became of those that have a status."""

    services: Mapping[Name, Service] = field(default_factory=dict)
    workloads: Mapping[Name, Workload] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    policies: tuple[Policy, ...] = ()
    ignored: tuple[str, ...] = ()
    statuses: tuple[ObjectStatus, ...] = ()
