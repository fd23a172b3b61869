"""The accessLog part of a TrafficPolicy.

Envoy refuses a whole listener for one format that it cannot read. So formats are read here first.
"""

import re
from enum import StrEnum

from xds_server.ingest.reader import Field
from xds_server.ir import AccessLog, LogFormat

_MAX_LOGS = 4
_MAX_FIELDS = 64
_MAX_TEXT = 4096

#: Envoy's command operators (its manual, "Access logging"): those that stand alone ...
_PLAIN = frozenset(
    (
        "BYTES_RECEIVED",
        "BYTES_SENT",
        "CONNECTION_ID",
        "CONNECTION_TERMINATION_DETAILS",
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS",
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT",
        "DOWNSTREAM_LOCAL_ADDRESS",
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT",
        "DOWNSTREAM_LOCAL_PORT",
        "DOWNSTREAM_REMOTE_ADDRESS",
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT",
        "DOWNSTREAM_REMOTE_PORT",
        "DOWNSTREAM_WIRE_BYTES_RECEIVED",
        "DOWNSTREAM_WIRE_BYTES_SENT",
        "DURATION",
        "GRPC_STATUS",
        "GRPC_STATUS_NUMBER",
        "HOSTNAME",
        "PROTOCOL",
        "REQUEST_DURATION",
        "REQUEST_HEADERS_BYTES",
        "RESPONSE_CODE",
        "RESPONSE_CODE_DETAILS",
        "RESPONSE_DURATION",
        "RESPONSE_FLAGS",
        "RESPONSE_FLAGS_LONG",
        "RESPONSE_HEADERS_BYTES",
        "RESPONSE_TRAILERS_BYTES",
        "RESPONSE_TX_DURATION",
        "ROUTE_NAME",
        "START_TIME",
        "STREAM_ID",
        "UPSTREAM_CLUSTER",
        "UPSTREAM_HOST",
        "UPSTREAM_LOCAL_ADDRESS",
        "UPSTREAM_REMOTE_ADDRESS",
        "UPSTREAM_TRANSPORT_FAILURE_REASON",
        "UPSTREAM_WIRE_BYTES_RECEIVED",
        "UPSTREAM_WIRE_BYTES_SENT",
    )
)
#: ... and those that name a header, or another if that one is missing.
_OF_HEADERS = frozenset(("REQ", "RESP", "TRAILER"))
_HEADER = r":?[A-Za-z0-9!#$&'*+\-.^_`|~]+"
_COMMAND = re.compile(
    rf"%(?P<name>[A-Z_]+)(?:\((?P<header>{_HEADER}(?:\?{_HEADER})?)\))?(?P<length>:[0-9]{{1,5}})?%|%%"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

_DEFAULT_FIELDS = (
    ("authority", "%REQ(:AUTHORITY)%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration_ms", "%DURATION%"),
    ("local", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(:PATH)%"),
    ("peer", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%"),
    ("protocol", "%PROTOCOL%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("start_time", "%START_TIME%"),
    ("status", "%RESPONSE_CODE%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
)


class _Sink(StrEnum):
    STDOUT = "Stdout"
    FILE = "File"


def read_access_logs(field: Field) -> tuple[AccessLog, ...]:
    entries = field.filled("remove it, or say where the log goes")
    if len(entries) > _MAX_LOGS:
        field.problem(f"must have at most {_MAX_LOGS} entries")
    return tuple(map(_log, entries))


def _log(field: Field) -> AccessLog:
    field.complete()
    field.only("type", "path", "format", "text", "json", "filter")
    sink, path = field["type"].choice(_Sink, _Sink.STDOUT), field["path"]
    if sink is _Sink.FILE:
        text = path.text()
        if path.present and (
            not text.startswith("/") or len(text) > 1024 or not text.isprintable()
        ):
            path.problem("must be an absolute path that the sidecar's user may write to")
    elif path.present:
        path.problem("is for type File; remove it, or set type to File")
    form = field["format"].choice(LogFormat, LogFormat.TEXT)
    wanted, unwanted = ("json", "text") if form is LogFormat.JSON else ("text", "json")
    if field[unwanted].present:
        field[unwanted].problem(f"does not go with format {form.value}; use {wanted}")
    chosen = field["filter"]
    chosen.only("minStatus", "maxStatus")
    if chosen.value == {}:
        chosen.problem("says nothing; remove it to log every request")
    low, high = (
        chosen[name].integer(100, 599) if chosen[name].present else None
        for name in ("minStatus", "maxStatus")
    )
    if low is not None and high is not None and high < low:
        chosen["maxStatus"].problem("must not be below minStatus, or nothing is logged")
    return AccessLog(
        path.text("") or None,
        _format(field["text"]) if form is LogFormat.TEXT and field["text"].present else None,
        _fields(field["json"]) if form is LogFormat.JSON else (),
        low,
        high,
    )


def _fields(field: Field) -> tuple[tuple[str, str], ...]:
    if not field.present:
        return _DEFAULT_FIELDS
    if field.value == {}:
        field.problem("must not be empty; remove it to have the usual fields")
    pairs = field.labels()
    if len(pairs) > _MAX_FIELDS:
        field.problem(f"must have at most {_MAX_FIELDS} entries")
    if any(not key.isprintable() or not key for key in pairs):
        field.problem("must have printable keys")
    return tuple((key, _format(field[key])) for key in sorted(pairs))


def _format(field: Field) -> str:
    text = field.text()
    if not text or len(text) > _MAX_TEXT or _CONTROL.search(text):
        field.problem(f"must have 1 to {_MAX_TEXT} characters, without control characters")
        return ""
    for command in _COMMAND.finditer(text):
        name, header = command["name"], command["header"]
        if name is None:
            continue
        if name not in _PLAIN | _OF_HEADERS:
            field.problem(f"%{name}% is not known; Envoy's manual, 'Access logging', has them")
        elif (name in _OF_HEADERS) != (header is not None):
            field.problem(f"%{name}% must be written as %REQ(:PATH)%, or as %DURATION%")
        elif command["length"] and name not in _OF_HEADERS:
            field.problem(f"%{name}% takes no length; write it without {command['length']}")
    if "%" in _COMMAND.sub("", text):
        field.problem("has a % that begins no command such as %REQ(:PATH)%; write %% for a percent")
    return text
