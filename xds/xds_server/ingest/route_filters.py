"""What a rule of a route does to requests and responses: the Gateway API's filters."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from xds_server.ingest.cors import read_cors
from xds_server.ingest.reader import DNS_NAME, TOKEN, Field
from xds_server.ir import (
    Filters,
    HeaderChange,
    HeaderChanges,
    Mirror,
    Name,
    PathChange,
    PathPart,
    Redirect,
    Rewrite,
    RouteKind,
)

#: Envoy refuses header values beyond 16 KiB; this is the limit of the Gateway API.
_MAX_HEADER_VALUE = 4096
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*")
_NEW_PATH = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})*")
_STATUSES = (301, 302, 303, 307, 308)
_MILLION = 1_000_000

#: Reads a backendRef; None when there is nothing that requests could be sent to.
ReadBackend = Callable[[Field], tuple[Name, int] | None]


class _Filter(StrEnum):
    REQUEST_HEADERS = "RequestHeaderModifier"
    RESPONSE_HEADERS = "ResponseHeaderModifier"
    MIRROR = "RequestMirror"
    REDIRECT = "RequestRedirect"
    REWRITE = "URLRewrite"
    CORS = "CORS"

    @property
    def field(self) -> str:
        """Where the filter says what it does: `urlRewrite`."""
        initials = {_Filter.REWRITE: "urlRewrite", _Filter.CORS: "cors"}
        return initials.get(self, self[0].lower() + self[1:])


_KNOWN = {
    RouteKind.HTTP: tuple(_Filter),
    RouteKind.GRPC: (_Filter.REQUEST_HEADERS, _Filter.RESPONSE_HEADERS, _Filter.MIRROR),
}


class _PathType(StrEnum):
    FULL = "ReplaceFullPath"
    PREFIX = "ReplacePrefixMatch"


class _Scheme(StrEnum):
    HTTP = "http"
    HTTPS = "https"


@dataclass(eq=False)
class FilterReader:
    """Reads the filters of a route's rules. `incompatible` tells afterwards that some cannot be
    combined."""

    kind: RouteKind
    read_backend: ReadBackend
    incompatible: bool = False

    def read(self, filters: Field) -> Filters:
        """A list of filters."""
        known = _KNOWN[self.kind]
        found: dict[_Filter, Field] = {}
        mirrors: list[Mirror] = []
        for item in filters.items():
            named = item["type"].text()
            if named not in known:
                if item["type"].present:
                    item["type"].problem(
                        f"this filter is not supported (known: {', '.join(known)}); remove it"
                    )
                continue
            kind = _Filter(named)
            item.only("type", kind.field)
            what = item[kind.field]
            if not what.present:
                what.problem("is required; add it")
            if kind is _Filter.MIRROR:
                mirrors += self._mirror(what)
            elif kind in found:
                item["type"].problem("is given twice; put all of it into one filter")
            else:
                found[kind] = what
        redirect, rewrite = found.get(_Filter.REDIRECT), found.get(_Filter.REWRITE)
        if redirect and rewrite:
            redirect.problem("cannot be combined with URLRewrite; remove one of them")
            self.incompatible = True
        return Filters(
            HeaderChanges(
                *(
                    _headers(found[kind]) if kind in found else HeaderChange()
                    for kind in (_Filter.REQUEST_HEADERS, _Filter.RESPONSE_HEADERS)
                )
            ),
            _redirect(redirect) if redirect else None,
            _rewrite(rewrite) if rewrite else Rewrite(),
            tuple(mirrors),
            read_cors(found[_Filter.CORS]) if _Filter.CORS in found else None,
        )

    def _mirror(self, mirror: Field) -> list[Mirror]:
        mirror.only("backendRef", "percent", "fraction")
        percent, fraction = mirror["percent"], mirror["fraction"]
        per_million = _MILLION
        if percent.present:
            per_million = percent.integer(0, 100) * _MILLION // 100
            if fraction.present:
                fraction.problem("must not be given with percent; keep one of them")
        elif fraction.present:
            fraction.only("numerator", "denominator")
            denominator = fraction["denominator"].integer(1, 2**31 - 1, 100)
            numerator = fraction["numerator"].integer(0, denominator)
            per_million = numerator * _MILLION // denominator
        reference = mirror["backendRef"]
        if not reference.present:
            reference.problem("is required; add it")
            return []
        backend = self.read_backend(reference)
        return [Mirror(*backend, per_million)] if backend else []


def _headers(change: Field) -> HeaderChange:
    change.only("set", "add", "remove")

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
        field.problem("Host cannot be changed by a header filter; use URLRewrite's hostname")
    return name


def _redirect(redirect: Field) -> Redirect:
    redirect.only("scheme", "hostname", "path", "port", "statusCode")
    scheme, port, status = redirect["scheme"], redirect["port"], redirect["statusCode"]
    code = status.integer(301, 308, 302)
    if code not in _STATUSES:
        status.problem(f"must be one of {', '.join(map(str, _STATUSES))}")
    return Redirect(
        scheme.choice(_Scheme, _Scheme.HTTP).value if scheme.present else None,
        _hostname(redirect["hostname"]),
        port.port() if port.present else None,
        _path(redirect["path"]),
        code,
    )


def _rewrite(rewrite: Field) -> Rewrite:
    rewrite.only("hostname", "path")
    return Rewrite(_hostname(rewrite["hostname"]), _path(rewrite["path"]))


def _hostname(field: Field) -> str | None:
    if not field.present:
        return None
    return field.matching(DNS_NAME, "a host name such as web.example.com") or None


def _path(path: Field) -> PathChange | None:
    if not path.present:
        return None
    if not path["type"].present:
        path["type"].problem("is required; add it")
        return None
    kind = path["type"].choice(_PathType, _PathType.FULL)
    own = kind[0].lower() + kind[1:]
    path.only("type", own)
    value = path[own]
    text = value.text()
    if not _NEW_PATH.fullmatch(text) or len(text) > 1024:
        value.problem("must be a path of at most 1024 characters, without query or fragment")
    if kind is _PathType.FULL:
        return PathChange(PathPart.FULL, f"/{text.lstrip('/')}")
    text = text.strip("/")
    return PathChange(PathPart.PREFIX, f"/{text}" if text else "")
