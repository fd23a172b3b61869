"""How a traffic policy has endpoints chosen, and spared: parts of a client's cluster."""

from envoy.config.cluster.v3 import circuit_breaker_pb2, cluster_pb2, outlier_detection_pb2
from envoy.config.core.v3 import extension_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.load_balancing_policies.common.v3 import common_pb2
from envoy.extensions.load_balancing_policies.maglev.v3 import maglev_pb2
from envoy.extensions.load_balancing_policies.ring_hash.v3 import ring_hash_pb2
from google.protobuf.message import Message

from xds_server.ir import (
    Balancing,
    CircuitBreaker,
    CookieHash,
    HashKey,
    HeaderHash,
    LoadBalancer,
    Outliers,
    SourceHash,
    TrafficPolicy,
)
from xds_server.translate.messages import duration, packed

_LB = cluster_pb2.Cluster.LbPolicy
_LB_POLICIES = {
    Balancing.ROUND_ROBIN: _LB.ROUND_ROBIN,
    Balancing.LEAST_REQUEST: _LB.LEAST_REQUEST,
    Balancing.RANDOM: _LB.RANDOM,
}


def shape(cluster: cluster_pb2.Cluster, policy: TrafficPolicy | None) -> None:
    """How the cluster's endpoints are chosen and spared."""
    if policy is None:
        return
    if policy.outliers:
        cluster.outlier_detection.CopyFrom(_outliers(policy.outliers))
    if policy.breaker:
        _limit_use(cluster.circuit_breakers.thresholds[0], policy.breaker)
    if policy.balancer:
        balance(cluster, policy.balancer)


def _outliers(outliers: Outliers) -> outlier_detection_pb2.OutlierDetection:
    """Only what was asked for counts: Envoy's own statistics of success would eject more. One
    endpoint may always go, or the default of 10 % would spare every one of fewer than ten."""
    result = outlier_detection_pb2.OutlierDetection()
    result.interval.CopyFrom(duration(outliers.interval))
    result.base_ejection_time.CopyFrom(duration(outliers.base_ejection_time))
    result.max_ejection_time.CopyFrom(duration(outliers.max_ejection_time))
    result.max_ejection_percent.value = outliers.max_ejection_percent
    result.always_eject_one_host.value = True
    result.enforcing_success_rate.value = 0
    if outliers.consecutive_5xx is None:
        result.enforcing_consecutive_5xx.value = 0
    else:
        result.consecutive_5xx.value = outliers.consecutive_5xx
    if outliers.consecutive_gateway_errors is not None:
        result.consecutive_gateway_failure.value = outliers.consecutive_gateway_errors
        result.enforcing_consecutive_gateway_failure.value = 100
    return result


def _limit_use(
    thresholds: circuit_breaker_pb2.CircuitBreakers.Thresholds, breaker: CircuitBreaker
) -> None:
    for name in ("max_connections", "max_pending_requests", "max_requests", "max_retries"):
        value = getattr(breaker, name)
        if value is not None:
            getattr(thresholds, name).value = value


def balance(cluster: cluster_pb2.Cluster, balancer: LoadBalancer) -> None:
    """Has the cluster's endpoints chosen in this way, whatever was said before."""
    cluster.ClearField("load_balancing_policy")
    if not balancer.balancing.hashes:
        cluster.lb_policy = _LB_POLICIES[balancer.balancing]
        return
    # What to hash belongs to the cluster: a route may lead to several that differ in it.
    hashing = common_pb2.ConsistentHashingLbConfig(hash_policy=map(_hash_policy, balancer.keys))
    config: Message
    if balancer.balancing is Balancing.RING_HASH:
        config = ring_hash_pb2.RingHash(consistent_hashing_lb_config=hashing)
    else:
        config = maglev_pb2.Maglev(consistent_hashing_lb_config=hashing)
    cluster.ClearField("lb_policy")
    chosen = extension_pb2.TypedExtensionConfig(
        name=balancer.balancing.value, typed_config=packed(config)
    )
    cluster.load_balancing_policy.policies.add(typed_extension_config=chosen)


def _hash_policy(key: HashKey) -> route_components_pb2.RouteAction.HashPolicy:
    result = route_components_pb2.RouteAction.HashPolicy()
    match key:
        case HeaderHash(name):
            result.header.header_name = name
        case CookieHash(name, ttl, path):
            result.cookie.name = name
            result.cookie.path = path
            if ttl is not None:
                result.cookie.ttl.CopyFrom(duration(ttl))
        case SourceHash():
            result.connection_properties.source_ip = True
    return result
