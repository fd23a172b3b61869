"""HTTPRoutes whose parent is a Service (GAMMA), and the ReferenceGrants they need."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from xds_server.ingest.core import RawService
from xds_server.ingest.reader import DNS_NAME, TOKEN, Field, Item, first_of_each
from xds_server.ir import (
    Backend,
    HeaderChange,
    HeaderChanges,
    MatchKind,
    Name,
    NamedMatch,
    Parent,
    Protocol,
    Route,
    RouteMatch,
    RouteRule,
    StringMatch,
)

GATEWAY_GROUP = "gateway.networking.k8s.io"
MAX_WEIGHT = 1_000_000
#: Envoy refuses header values beyond 16 KiB, and weights whose sum has more than 32 bits; these are
#: the limits of the Gateway API.
_MAX_HEADER_VALUE = 4096
_MAX_BACKENDS = 16

_HOSTNAME = re.compile(rf"(\*\.)?{DNS_NAME.pattern}")
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_BAD_PATH = re.compile(r"//|/\.\.?(/|$)|%2[fF]|#|\?")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*")


class _PathType(StrEnum):
    EXACT = "Exact"
    PREFIX = "PathPrefix"
    REGEX = "RegularExpression"


class ValueType(StrEnum):
    """How a header or query parameter is compared."""

    EXACT = "Exact"
    REGEX = "RegularExpression"


@dataclass(frozen=True)
class Grant:
    """`service` None is every service of the namespace."""

    route_namespace: str
    service_namespace: str
    service: str | None


def read_grant(item: Item) -> list[Grant]:
    """What a ReferenceGrant lets HTTPRoutes of other namespaces refer to."""
    froms = [
        source["namespace"].namespace()
        for source in item.spec["from"].items()
        if source["group"].text() == GATEWAY_GROUP and source["kind"].text() == "HTTPRoute"
    ]
    names = [
        target["name"].text() if target["name"].present else None
        for target in item.spec["to"].items()
        if target["group"].text("") == "" and target["kind"].text() == "Service"
    ]
    return [Grant(source, item.name.namespace, name) for source in froms for name in names]


@dataclass(frozen=True, eq=False)
class RouteReader:
    """Reads routes against the services and grants there are."""

    services: Mapping[Name, RawService]
    grants: Iterable[Grant]

    def read(self, item: Item) -> Route | None:
        """None for a route that has no Service as a parent: it is not the mesh's."""
        spec = item.spec
        references = [
            parent
            for parent in spec["parentRefs"].items()
            if parent["group"].text(GATEWAY_GROUP) == "" and parent["kind"].value == "Service"
        ]
        if not references:
            return None
        spec.only("parentRefs", "hostnames", "rules")
        parents: list[Parent] = []
        for reference in references:
            parents += (p for p in self._parents(item, reference) if p not in parents)
        hostnames = [_hostname(host) for host in spec["hostnames"].items()]
        rules = spec["rules"].items()
        if not rules and not spec["rules"].present:
            # The API server defaults a route without rules to one that matches everything.
            spec["rules"].problem("is required; add a rule with backendRefs")
        return Route(
            item.name,
            item.root["metadata"]["creationTimestamp"].text(""),
            tuple(sorted(parents)),
            tuple(sorted(set(hostnames))),
            tuple(self._rule(item, rule) for rule in rules),
        )

    def _parents(self, item: Item, reference: Field) -> list[Parent]:
        reference.only("group", "kind", "namespace", "name", "port")
        name = Name(reference["namespace"].namespace(item.name.namespace), reference["name"].text())
        service = self.services.get(name)
        if service is None:
            if reference["name"].present:
                reference["name"].misfit(f"there is no Service {name}; create it or correct this")
            return []
        if reference["port"].present:
            number = reference["port"].port()
            port = service.port(number)
            if port is None:
                reference["port"].misfit(f"Service {name} has no such port; {_ports(service)}")
                return []
            if port.declared is Protocol.TCP:
                reference["port"].misfit(
                    f"port {number} of Service {name} is not HTTP; set its appProtocol to http"
                )
                return []
            return [Parent(name, number)]
        numbers = [port.number for port in service.ports if port.declared is not Protocol.TCP]
        if not numbers:
            reference["name"].misfit(
                f"Service {name} has no HTTP port; set a port's appProtocol to http"
            )
        return [Parent(name, number) for number in numbers]

    def _rule(self, item: Item, rule: Field) -> RouteRule:
        rule.only("name", "matches", "filters", "backendRefs", "timeouts")
        timeouts = rule["timeouts"]
        timeouts.only("request", "backendRequest")
        whole, single = timeouts["request"].duration(), timeouts["backendRequest"].duration()
        if whole and single and single > whole:
            timeouts["backendRequest"].problem(
                "must not be longer than timeouts.request, which would cut it off first"
            )
        matches = tuple(_match(match) for match in rule["matches"].items())
        backends = rule["backendRefs"].items()
        if len(backends) > _MAX_BACKENDS:
            rule["backendRefs"].problem(f"must have at most {_MAX_BACKENDS} entries")
        return RouteRule(
            matches or (RouteMatch(),),
            tuple(self._backend(item, backend) for backend in backends),
            _filters(rule["filters"]),
            whole,
            single,
            rule["name"].text(""),
        )

    def _backend(self, item: Item, reference: Field) -> Backend:
        reference.only("group", "kind", "namespace", "name", "port", "weight", "filters")
        name = Name(reference["namespace"].namespace(item.name.namespace), reference["name"].text())
        if reference["group"].text("") != "" or reference["kind"].text("Service") != "Service":
            reference["kind"].problem("only a Service (group '') can be a backend")
        number = reference["port"].port()
        service = self.services.get(name)
        found = False
        if not self._granted(item.name.namespace, name):
            # Said first, and alone: whether the service exists is not for this namespace to know.
            reference["namespace"].misfit(
                f"RefNotPermitted: a ReferenceGrant in namespace {name.namespace} must allow "
                f"HTTPRoutes of {item.name.namespace} to refer to Service {name.name}"
            )
        elif service is None:
            if reference["name"].present:
                reference["name"].misfit(f"there is no Service {name}; create it or correct this")
        elif service.port(number) is None:
            if isinstance(reference["port"].value, int):
                reference["port"].misfit(f"Service {name} has no such port; {_ports(service)}")
        else:
            found = True
        return Backend(
            name,
            number,
            reference["weight"].integer(0, MAX_WEIGHT, 1),
            _filters(reference["filters"]),
            found,
        )

    def _granted(self, namespace: str, service: Name) -> bool:
        return namespace == service.namespace or any(
            grant.route_namespace == namespace
            and grant.service_namespace == service.namespace
            and grant.service in (None, service.name)
            for grant in self.grants
        )


def _hostname(host: Field) -> str:
    text = host.matching(_HOSTNAME, "a host name such as web.example.com or *.example.com")
    if text.replace(".", "").isdecimal():
        host.problem("must not be an IP address; use a host name")
    return text


def _ports(service: RawService) -> str:
    ports = ", ".join(str(port.number) for port in service.ports)
    return f"it has {ports}" if ports else "it has none"


def _match(match: Field) -> RouteMatch:
    match.only("path", "headers", "queryParams", "method")
    if match["method"].present and match["method"].text() not in _METHODS:
        match["method"].problem(f"must be one of {', '.join(_METHODS)}")
    return RouteMatch(
        _path(match["path"]),
        match["method"].text("") or None,
        first_of_each([header_match(header) for header in match["headers"].items()]),
        first_of_each(
            [
                NamedMatch(query["name"].matching(TOKEN, "a query parameter's name"), _value(query))
                for query in match["queryParams"].items()
            ]
        ),
    )


def _path(path: Field) -> StringMatch:
    path.only("type", "value")
    kind = path["type"].choice(_PathType, _PathType.PREFIX)
    value = path["value"]
    if kind is _PathType.REGEX:
        return StringMatch(MatchKind.REGEX, value.regex())
    text = value.text("/")
    if not text.startswith("/") or len(text) > 1024:
        value.problem("must begin with / and have at most 1024 characters")
    elif _BAD_PATH.search(text):
        value.problem("must not contain '//', '/./', '/../', '%2f', '#' or '?'")
    if kind is _PathType.EXACT:
        return StringMatch(MatchKind.EXACT, text)
    return StringMatch(MatchKind.PREFIX, text.rstrip("/") or "/")


def header_match(header: Field) -> NamedMatch:
    """A header by name; the name in lower case."""
    name = header["name"].matching(TOKEN, "a header name").lower()
    return NamedMatch(name, _value(header))


def _value(field: Field) -> StringMatch:
    field.only("name", "type", "value")
    if field["type"].choice(ValueType, ValueType.EXACT) is ValueType.REGEX:
        return StringMatch(MatchKind.REGEX, field["value"].regex())
    return StringMatch(MatchKind.EXACT, field["value"].text())


_CHANGES = {
    "RequestHeaderModifier": "requestHeaderModifier",
    "ResponseHeaderModifier": "responseHeaderModifier",
}


def _filters(filters: Field) -> HeaderChanges:
    changes: dict[str, HeaderChange] = {}
    for item in filters.items():
        kind = item["type"].text()
        name = _CHANGES.get(kind)
        if name is None:
            if item["type"].present:
                item["type"].problem(
                    f"this filter is not supported (known: {', '.join(_CHANGES)}); remove it"
                )
            continue
        item.only("type", name)
        if name in changes:
            item["type"].problem("is given twice; put all changes into one filter")
        changes[name] = _change(item[name])
    return HeaderChanges(
        changes.get("requestHeaderModifier", HeaderChange()),
        changes.get("responseHeaderModifier", HeaderChange()),
    )


def _change(change: Field) -> HeaderChange:
    change.only("set", "add", "remove")
    if not change.present:
        change.problem("is required; add it")

    def pairs(entries: Field) -> tuple[tuple[str, str], ...]:
        kept: dict[str, tuple[str, str]] = {}
        for entry in entries.items():
            entry.only("name", "value")
            name = _changeable(entry["name"])
            value = entry["value"].text()
            if not _HEADER_VALUE.fullmatch(value):
                entry["value"].problem("must not contain control characters")
            elif len(value) > _MAX_HEADER_VALUE:
                entry["value"].problem(f"must have at most {_MAX_HEADER_VALUE} characters")
            kept.setdefault(name.lower(), (name, value))
        return tuple(kept.values())

    return HeaderChange(
        pairs(change["set"]),
        pairs(change["add"]),
        tuple(_changeable(entry) for entry in change["remove"].items()),
    )


def _changeable(field: Field) -> str:
    name = field.matching(TOKEN, "a header name")
    if name.lower() == "host":
        field.problem("Host cannot be changed by a header filter; remove it")
    return name
