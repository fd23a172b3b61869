"""Traffic policies as Envoy has them.

Where each part acts: what chooses and guards endpoints (load balancing, outliers, circuit breakers)
is the client's cluster; faults happen in the client's sidecar, before the network; a Service's rate
limit, its connections and its access log belong to the sidecar of the pod that serves, so that they
hold for all clients together. A route's rate limit is the client's, since only there routes are
known.

A client's part comes with its routes: a change of it closes no connection. The filters are in
every chain, switched off until a route configures them. The serving pod's part is in the chain
itself: its routes carry the pod's authorization policies, which change with every pod that comes or
goes, and a rate limit begins anew, with a full bucket, when the configuration around it changes.
"""

from collections.abc import Mapping
from datetime import timedelta

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.common.fault.v3 import fault_pb2 as common_fault_pb2
from envoy.extensions.filters.http.cors.v3 import cors_pb2
from envoy.extensions.filters.http.fault.v3 import fault_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from envoy.extensions.filters.network.connection_limit.v3 import connection_limit_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as hcm_pb2,
)
from envoy.extensions.filters.network.local_ratelimit.v3 import (
    local_rate_limit_pb2 as network_rate_limit_pb2,
)
from envoy.type.v3 import percent_pb2, token_bucket_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from xds_server.ir import (
    Fault,
    RateLimit,
    TrafficPolicy,
)
from xds_server.translate.cors import CORS
from xds_server.translate.listeners import Filter, network_filter
from xds_server.translate.messages import duration, packed

_FAULT = "fault"
_RATE_LIMIT = "rate_limit"
_CONNECTION_LIMIT = "connection_limit"
_MILLION = percent_pb2.FractionalPercent.DenominatorType.MILLION
#: The namespace of what we put into metadata.
_OURS = "redirector"
_UNLIMITED = RateLimit(2**32 - 1, timedelta(seconds=1), 2**32 - 1)
_ALWAYS = base_pb2.RuntimeFractionalPercent(
    default_value=percent_pb2.FractionalPercent(numerator=100)
)


def outbound_filters() -> list[hcm_pb2.HttpFilter]:
    """The places in a client's filter chain; off until a route configures them."""
    return [
        _switched_off(CORS, cors_pb2.Cors()),
        _switched_off(_RATE_LIMIT, local_rate_limit_pb2.LocalRateLimit(stat_prefix=_RATE_LIMIT)),
        _switched_off(_FAULT, fault_pb2.HTTPFault()),
    ]


def inbound_filters(policy: TrafficPolicy | None) -> list[hcm_pb2.HttpFilter]:
    """The filters of a pod that serves, behind those that refuse: only what passes them counts."""
    if policy is None or policy.rate_limit is None:
        return []
    return [hcm_pb2.HttpFilter(name=_RATE_LIMIT, typed_config=packed(_limit(policy.rate_limit)))]


def faults(fault: Fault | None) -> dict[str, Any]:
    """The filter's configuration where requests are routed, by its name; nothing without one."""
    return {_FAULT: packed(_fault(fault))} if fault else {}


def limits(shared: Mapping[str, RateLimit]) -> dict[str, Any]:
    """The configuration of a whole table of routes, each of which says with `limit_as` which limit
    it is under. One of a route's own would be counted for each of the many that a rule comes to:
    for its matches, its backends, and for each host name."""
    if not shared:
        return {}
    result = _enforced()
    # Of what is under no limit.
    result.token_bucket.CopyFrom(_bucket(_UNLIMITED))
    for name, limit in sorted(shared.items()):
        descriptor = result.descriptors.add(token_bucket=_bucket(limit))
        descriptor.entries.add(key=_RATE_LIMIT, value=name)
    said = result.rate_limits.add().actions.add().metadata
    said.descriptor_key = _RATE_LIMIT
    said.source = route_components_pb2.RateLimit.Action.MetaData.Source.ROUTE_ENTRY
    said.skip_if_absent = True
    said.metadata_key.key = _OURS
    said.metadata_key.path.add(key=_RATE_LIMIT)
    return {_RATE_LIMIT: packed(result)}


def limit_as(route: route_components_pb2.Route, name: str) -> None:
    """Puts a route under one of its table's limits."""
    route.metadata.filter_metadata[_OURS].update({_RATE_LIMIT: name})


def connection_filters(
    policy: TrafficPolicy | None, port: int | None, *, http: bool
) -> list[Filter]:
    """What judges connections that arrive at a pod. On a port that is not HTTP a connection is what
    a request is elsewhere."""
    if policy is None:
        return []
    found = []
    if policy.max_connections is not None:
        most = connection_limit_pb2.ConnectionLimit(stat_prefix=_CONNECTION_LIMIT)
        most.max_connections.value = policy.max_connections
        found.append(network_filter(_CONNECTION_LIMIT, most))
    if policy.rate_limit and not http:
        rate = network_rate_limit_pb2.LocalRateLimit(
            stat_prefix=_RATE_LIMIT,
            token_bucket=_bucket(policy.rate_limit),
            # Outlives the chain, which changes with the authorization policies in it.
            share_key=f"{policy.name}|{port}",
        )
        found.append(network_filter(_RATE_LIMIT, rate))
    return found


def _switched_off(name: str, config: Message) -> hcm_pb2.HttpFilter:
    return hcm_pb2.HttpFilter(name=name, typed_config=packed(config), disabled=True)


def _bucket(limit: RateLimit) -> token_bucket_pb2.TokenBucket:
    result = token_bucket_pb2.TokenBucket(
        max_tokens=limit.burst, fill_interval=duration(limit.interval)
    )
    result.tokens_per_fill.value = limit.requests
    return result


def _limit(limit: RateLimit) -> local_rate_limit_pb2.LocalRateLimit:
    result = _enforced()
    result.token_bucket.CopyFrom(_bucket(limit))
    return result


def _enforced() -> local_rate_limit_pb2.LocalRateLimit:
    return local_rate_limit_pb2.LocalRateLimit(
        stat_prefix=_RATE_LIMIT,
        filter_enabled=_ALWAYS,
        filter_enforced=_ALWAYS,
        rate_limited_as_resource_exhausted=True,
    )


def _fault(fault: Fault) -> fault_pb2.HTTPFault:
    result = fault_pb2.HTTPFault()
    if fault.delay:
        result.delay.CopyFrom(
            common_fault_pb2.FaultDelay(
                fixed_delay=duration(fault.delay.time), percentage=_parts(fault.delay.parts)
            )
        )
    if fault.abort:
        result.abort.percentage.CopyFrom(_parts(fault.abort.parts))
        if fault.abort.http is not None:
            result.abort.http_status = fault.abort.http
        elif fault.abort.grpc is not None:
            result.abort.grpc_status = fault.abort.grpc
    return result


def _parts(millionths: int) -> percent_pb2.FractionalPercent:
    return percent_pb2.FractionalPercent(numerator=millionths, denominator=_MILLION)


def configure(
    message: route_components_pb2.Route | route_pb2.RouteConfiguration, configs: Mapping[str, Any]
) -> None:
    """Puts the filters' configurations where they hold."""
    for name, config in configs.items():
        message.typed_per_filter_config[name].CopyFrom(config)
