"""The CORS filter of HTTPRoutes (Gateway API, HTTPCORSFilter)."""

import re

from xds_server.ingest.reader import TOKEN, Field
from xds_server.ir import ANY_ORIGIN, Cors, MatchKind, StringMatch

_ANY = "*"
_ORIGIN = re.compile(r"(https?)://([-A-Za-z0-9.*]+|\*)(?::([1-9][0-9]{0,4}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
#: As the API's schema has it.
_MOST = 64
_DEFAULT_AGE_S = 5


def read_cors(cors: Field) -> Cors:
    """The filter's field `cors`."""
    cors.only(
        *("allowOrigins", "allowCredentials", "allowMethods"),
        *("allowHeaders", "exposeHeaders", "maxAge"),
    )
    origins = _listed(cors["allowOrigins"])
    return Cors(
        tuple(ANY_ORIGIN if field.value == _ANY else _origin(field) for field in origins),
        cors["allowCredentials"].boolean(False),
        tuple(map(_method, _listed(cors["allowMethods"]))),
        tuple(_header(field) for field in _listed(cors["allowHeaders"])),
        tuple(_header(field) for field in _listed(cors["exposeHeaders"])),
        cors["maxAge"].integer(1, 2**31 - 1, _DEFAULT_AGE_S),
    )


def _listed(given: Field) -> list[Field]:
    fields = given.items()
    if len(fields) > _MOST:
        given.problem(f"must have at most {_MOST} entries")
    if len(fields) > 1 and any(field.value == _ANY for field in fields):
        given.problem("must not have '*' beside other entries; keep one of both")
    return fields


def _origin(field: Field) -> StringMatch:
    """`*` stands for any part of a host name, dots included. Who asks tells a port only where it is
    not the scheme's."""
    found = _ORIGIN.fullmatch(field.text())
    if found is None:
        field.problem("is not an origin such as https://www.example.com or https://*.example.com")
        return ANY_ORIGIN
    scheme, host, port = found.groups()
    body = "[^/:]*".join(re.escape(part) for part in host.lower().split("*"))
    usual = _DEFAULT_PORTS[scheme]
    end = f"(?::{usual})?" if port in (None, usual) else f":{port}"
    return StringMatch(MatchKind.REGEX, f"{scheme}://{body}{end}")


def _method(field: Field) -> str:
    text = field.text()
    if text not in (*_METHODS, _ANY):
        field.problem(f"must be one of {', '.join(_METHODS)}, or *")
    return text


def _header(field: Field) -> str:
    return _ANY if field.value == _ANY else field.matching(TOKEN, "a header name")
