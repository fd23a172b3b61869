"""Access logs of traffic policies."""

from collections.abc import Sequence

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import substitution_format_string_pb2
from envoy.extensions.access_loggers.file.v3 import file_pb2
from envoy.extensions.access_loggers.stream.v3 import stream_pb2
from google.protobuf.message import Message

from xds_server.ir import (
    AccessLog,
    TrafficPolicy,
)
from xds_server.translate.messages import packed


def access_logs(policy: TrafficPolicy | None) -> list[accesslog_pb2.AccessLog]:
    return [_access_log(log) for log in policy.access_logs] if policy else []


def _access_log(log: AccessLog) -> accesslog_pb2.AccessLog:
    form = _format(log)
    sink: Message
    if log.path is None:
        sink = stream_pb2.StdoutAccessLog(log_format=form)
    else:
        sink = file_pb2.FileAccessLog(path=log.path, log_format=form)
    result = accesslog_pb2.AccessLog(
        name="stdout" if log.path is None else "file", typed_config=packed(sink)
    )
    bounds = [
        _status_filter(operation, status)
        for operation, status in (("GE", log.min_status), ("LE", log.max_status))
        if status is not None
    ]
    if bounds:
        result.filter.CopyFrom(_all_of(bounds))
    return result


def _format(log: AccessLog) -> substitution_format_string_pb2.SubstitutionFormatString | None:
    """None is Envoy's own line, which ends with a newline; ours must be given one."""
    result = substitution_format_string_pb2.SubstitutionFormatString()
    if log.fields:
        result.json_format.update(dict(log.fields))
    elif log.text is not None:
        result.text_format_source.inline_string = log.text.removesuffix("\n") + "\n"
    else:
        return None
    return result


def _status_filter(operation: str, status: int) -> accesslog_pb2.AccessLogFilter:
    result = accesslog_pb2.AccessLogFilter()
    comparison = result.status_code_filter.comparison
    comparison.op = accesslog_pb2.ComparisonFilter.Op.Value(operation)
    comparison.value.default_value = status
    # Envoy asks for a key that an operator could override the number with.
    comparison.value.runtime_key = f"access_log.{operation.lower()}_status"
    return result


def _all_of(filters: Sequence[accesslog_pb2.AccessLogFilter]) -> accesslog_pb2.AccessLogFilter:
    if len(filters) == 1:
        return filters[0]
    return accesslog_pb2.AccessLogFilter(and_filter=accesslog_pb2.AndFilter(filters=filters))
