"""Where each sidecar stands, over Envoy's client status discovery service (CSDS).

Source: envoy/service/status/v3/csds.proto. An answer has one entry for each type, as Istio's has.
It tells one sidecar of all others, so it is for an address that sidecars do not reach.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import grpc
from envoy.admin.v3.config_dump_shared_pb2 import ClientResourceStatus
from envoy.service.status.v3.csds_pb2 import (
    ClientConfig,
    ClientStatusRequest,
    ClientStatusResponse,
    ConfigStatus,
)

from redirector.bootstrap import node_id
from xds_server.ir import NodeId
from xds_server.standing import Standing, Sync, TypeStanding

SERVICE = "envoy.service.status.v3.ClientStatusDiscoveryService"
FETCH, STREAM = "FetchClientStatus", "StreamClientStatus"

_CONFIG = {
    Sync.SYNCED: ConfigStatus.SYNCED,
    Sync.STALE: ConfigStatus.STALE,
    Sync.NOT_SENT: ConfigStatus.NOT_SENT,
    Sync.NACKED: ConfigStatus.ERROR,
}
_CLIENT = {
    Sync.SYNCED: ClientResourceStatus.ACKED,
    Sync.STALE: ClientResourceStatus.REQUESTED,
    Sync.NOT_SENT: ClientResourceStatus.UNKNOWN,
    Sync.NACKED: ClientResourceStatus.NACKED,
}
_SYNC = {config: sync for sync, config in _CONFIG.items()}
_VARIANT, _CONNECTED = "variant", "connected_at"
_MATCHERS: dict[str, Callable[[str, str], bool]] = {
    "exact": str.__eq__,
    "prefix": str.startswith,
    "suffix": str.endswith,
    "contains": str.__contains__,
}


class UnsupportedMatch(ValueError):  # noqa: N818 - reads as the state it reports
    """A request asks for a kind of match that is not known here."""


def handlers(standings: Callable[[], Iterable[Standing]]) -> "grpc.GenericRpcHandler[Any, Any]":
    """The service's methods for a grpc.aio server."""

    async def answer(request: Any, context: Any) -> ClientStatusResponse:
        try:
            return encode(request, standings())
        except UnsupportedMatch as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def stream(requests: AsyncIterator[Any], context: Any) -> None:
        async for request in requests:
            await context.write(await answer(request, context))

    decode, to_bytes = ClientStatusRequest.FromString, ClientStatusResponse.SerializeToString
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            FETCH: grpc.unary_unary_rpc_method_handler(answer, decode, to_bytes),
            STREAM: grpc.stream_stream_rpc_method_handler(stream, decode, to_bytes),
        },
    )


def encode(request: ClientStatusRequest, standings: Iterable[Standing]) -> ClientStatusResponse:
    """The sidecars that any of the request's matchers takes; without matchers, all."""
    response = ClientStatusResponse()
    for standing in sorted(standings, key=lambda s: (s.node.namespace, s.node.pod, s.connected_at)):
        node = standing.node
        identity = node_id(node.pod, node.namespace, node.ip)
        if not request.node_matchers or any(_takes(m, identity) for m in request.node_matchers):
            _fill(response.config.add(), identity, standing)
    return response


def _takes(matcher: Any, identity: str) -> bool:
    if matcher.node_metadatas:
        raise UnsupportedMatch("node_matchers.node_metadatas: not supported; match by node_id")
    if not matcher.HasField("node_id"):
        return True
    pattern = matcher.node_id.WhichOneof("match_pattern")
    if pattern not in _MATCHERS:
        raise UnsupportedMatch(
            f"node_matchers.node_id.{pattern}: not supported; use {', '.join(_MATCHERS)}"
        )
    text, wanted = identity, getattr(matcher.node_id, pattern)
    if matcher.node_id.ignore_case:
        text, wanted = text.lower(), wanted.lower()
    return _MATCHERS[pattern](text, wanted)


def _fill(config: ClientConfig, identity: str, standing: Standing) -> None:
    config.node.id = identity
    config.node.metadata.update({_VARIANT: standing.variant, _CONNECTED: standing.connected_at})
    for found in standing.types:
        entry = config.generic_xds_configs.add(
            type_url=found.type_url,
            version_info=found.version,
            config_status=_CONFIG[found.sync],
            client_status=_CLIENT[found.sync],
        )
        if found.accepted_at is not None:
            entry.last_updated.FromMicroseconds(round(found.accepted_at * 1e6))
        if found.refused_at is not None:
            state = entry.error_state
            state.details, state.version_info = found.error, found.refused_version
            state.last_update_attempt.FromMicroseconds(round(found.refused_at * 1e6))


def decode(response: ClientStatusResponse) -> Iterator[Standing]:
    """The other way round, for who asks."""
    for config in response.config:
        metadata = config.node.metadata
        yield Standing(
            NodeId.parse(config.node.id),
            metadata[_VARIANT],
            metadata[_CONNECTED],
            tuple(_type(entry) for entry in config.generic_xds_configs),
        )


def _type(entry: Any) -> TypeStanding:
    refused = entry.HasField("error_state")
    state = entry.error_state
    return TypeStanding(
        entry.type_url,
        _SYNC[entry.config_status],
        entry.version_info,
        _seconds(entry.last_updated) if entry.HasField("last_updated") else None,
        state.details,
        state.version_info,
        _seconds(state.last_update_attempt) if refused else None,
    )


def _seconds(stamp: Any) -> float:
    return float(stamp.ToMicroseconds() / 1e6)
