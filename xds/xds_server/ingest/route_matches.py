"""Which requests a rule of a route takes: matches of HTTPRoutes and GRPCRoutes."""

import re
from enum import StrEnum

from xds_server.ingest.reader import TOKEN, Field, first_of_each
from xds_server.ir import GrpcMatch, MatchKind, NamedMatch, RouteMatch, StringMatch

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
#: RFC 3986, 3.3, as HTTPPathMatch has it.
_PATH = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})*")
_BAD_PATH = re.compile(r"//|/\.\.?(/|$)|%2[fF]|#|\?")
_SERVICE = re.compile(r"\.?[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*")
_METHOD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


class _PathType(StrEnum):
    EXACT = "Exact"
    PREFIX = "PathPrefix"
    REGEX = "RegularExpression"


class ValueType(StrEnum):
    """How a header, a query parameter or a gRPC method is compared."""

    EXACT = "Exact"
    REGEX = "RegularExpression"


def http_match(match: Field) -> RouteMatch:
    """An HTTPRouteMatch."""
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


def grpc_match(match: Field) -> GrpcMatch:
    """A GRPCRouteMatch."""
    match.only("method", "headers")
    method = match["method"]
    method.only("type", "service", "method")
    kind = method["type"].choice(ValueType, ValueType.EXACT)
    service = _name(method["service"], kind, _SERVICE, "a gRPC service such as shop.v1.Cart")
    called = _name(method["method"], kind, _METHOD, "a gRPC method such as AddItem")
    if method.present and service is None and called is None:
        method.problem("must name a service or a method; remove it to match every call")
    headers = first_of_each([header_match(header) for header in match["headers"].items()])
    return GrpcMatch(service, called, headers)


def header_match(header: Field) -> NamedMatch:
    """A header by name; the name in lower case."""
    name = header["name"].matching(TOKEN, "a header name").lower()
    return NamedMatch(name, _value(header))


def _path(path: Field) -> StringMatch:
    path.only("type", "value")
    kind = path["type"].choice(_PathType, _PathType.PREFIX)
    value = path["value"]
    if kind is _PathType.REGEX:
        return StringMatch(MatchKind.REGEX, value.regex("/"))
    text = value.text("/")
    if not text.startswith("/") or len(text) > 1024:
        value.problem("must begin with / and have at most 1024 characters")
    elif _BAD_PATH.search(text):
        value.problem("must not contain '//', '/./', '/../', '%2f', '#' or '?'")
    elif not _PATH.fullmatch(text):
        value.problem("must be as in a URL; write other characters as %XX")
    if kind is _PathType.EXACT:
        return StringMatch(MatchKind.EXACT, text)
    return StringMatch(MatchKind.PREFIX, text.rstrip("/") or "/")


def _value(field: Field) -> StringMatch:
    field.only("name", "type", "value")
    if field["type"].choice(ValueType, ValueType.EXACT) is ValueType.REGEX:
        return StringMatch(MatchKind.REGEX, field["value"].regex())
    return StringMatch(MatchKind.EXACT, field["value"].text())


def _name(field: Field, kind: ValueType, pattern: re.Pattern[str], what: str) -> StringMatch | None:
    if field.value is None or field.value == "":
        return None
    if kind is ValueType.REGEX:
        return StringMatch(MatchKind.REGEX, field.regex())
    return StringMatch(MatchKind.EXACT, field.matching(pattern, what))
