"""Small pieces of Envoy messages that several resources are made of."""

from datetime import timedelta

from envoy.config.core.v3 import address_pb2, base_pb2, config_source_pb2
from envoy.type.matcher.v3 import regex_pb2, string_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from redirector.model import IPAddress, IPNetwork
from xds_server.ir import MatchKind, StringMatch

NO_TIMEOUT = Duration()
#: How many headers requests and responses may have, which Envoy refuses beyond 100 by default.
#: Their size is bounded as well.
MAX_HEADERS = 1000


def packed(message: Message) -> Any:
    """The message as an Any; deterministic, so that equal content has equal bytes."""
    result = Any()
    result.Pack(message, deterministic=True)
    return result


def duration(value: timedelta) -> Duration:
    result = Duration()
    result.FromTimedelta(value)
    return result


def socket_address(
    address: str, port: int, *, ipv4_compat: bool = False
) -> address_pb2.SocketAddress:
    return address_pb2.SocketAddress(address=address, port_value=port, ipv4_compat=ipv4_compat)


def cidr(network: IPNetwork | IPAddress) -> address_pb2.CidrRange:
    """A single address is the network of its own."""
    text, _, prefix = str(network).partition("/")
    result = address_pb2.CidrRange(address_prefix=text)
    result.prefix_len.value = int(prefix) if prefix else network.max_prefixlen
    return result


def ads() -> config_source_pb2.ConfigSource:
    """The resource comes over the same stream."""
    return config_source_pb2.ConfigSource(
        ads=config_source_pb2.AggregatedConfigSource(),
        resource_api_version=config_source_pb2.ApiVersion.V3,
    )


def string_matcher(match: StringMatch) -> string_pb2.StringMatcher:
    match match.kind:
        case MatchKind.EXACT:
            return string_pb2.StringMatcher(exact=match.value)
        case MatchKind.PREFIX:
            return string_pb2.StringMatcher(prefix=match.value)
        case MatchKind.SUFFIX:
            return string_pb2.StringMatcher(suffix=match.value)
        case MatchKind.REGEX:
            return string_pb2.StringMatcher(safe_regex=regex(match.value))


def regex(text: str) -> regex_pb2.RegexMatcher:
    return regex_pb2.RegexMatcher(regex=text)


def header_option(name: str, value: str, *, append: bool) -> base_pb2.HeaderValueOption:
    """Sets or adds a header. Envoy would take a % for the beginning of a command."""
    actions = base_pb2.HeaderValueOption.HeaderAppendAction
    return base_pb2.HeaderValueOption(
        header=base_pb2.HeaderValue(key=name, value=value.replace("%", "%%")),
        append_action=(
            actions.APPEND_IF_EXISTS_OR_ADD if append else actions.OVERWRITE_IF_EXISTS_OR_ADD
        ),
        keep_empty_value=True,
    )
