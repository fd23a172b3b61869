"""Static Envoy configurations of the comparison, as JSON objects. Pure.

Only what the way needs: no access log, no statistics sink, so that what differs between rungs is
how bytes reach Envoy. Field names: envoy.config.bootstrap.v3.Bootstrap.
"""

from collections.abc import Sequence

#: A JSON value as `json.dumps` takes it.
Json = str | int | bool | Sequence["Json"] | dict[str, "Json"]

_TYPE = "type.googleapis.com/envoy.extensions."
_HCM = "filters.network.http_connection_manager.v3.HttpConnectionManager"


def bootstrap(listeners: Sequence[Json], clusters: Sequence[Json] = ()) -> Json:
    """A whole configuration; no admin interface."""
    return {"static_resources": {"listeners": list(listeners), "clusters": list(clusters)}}


def address(where: str) -> Json:
    """`10.0.0.1:80` or `/path/of/a/socket`."""
    if where.startswith("/"):
        return {"pipe": {"path": where}}
    host, _, port = where.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def cluster(name: str, where: str) -> Json:
    """One fixed endpoint."""
    endpoint: Json = {"endpoint": {"address": address(where)}}
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def answer() -> Json:
    """A network filter: HTTP, answered by Envoy itself."""
    body: Json = {"inline_string": "hello\n"}
    return _http({"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": body}})


def forward(to: str) -> Json:
    """A network filter: HTTP, forwarded to the cluster `to`."""
    return _http({"match": {"prefix": "/"}, "route": {"cluster": to}})


def proxy_bytes(to: str) -> Json:
    """A network filter: bytes, forwarded to the cluster `to`."""
    config: Json = {
        "@type": _TYPE + "filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": to,
        "cluster": to,
    }
    return {"name": "tcp_proxy", "typed_config": config}


def listener(where: str, network_filter: Json) -> Json:
    """A listener that is connected to by its own address."""
    return {
        "name": where,
        "address": address(where),
        "filter_chains": [{"filters": [network_filter]}],
    }


def steered_listener(where: str, by_port: dict[int, Json]) -> Json:
    """A listener that connections are steered to; the original destination's port chooses."""
    original: Json = {"@type": _TYPE + "filters.listener.original_dst.v3.OriginalDst"}
    chains: list[Json] = [
        {"filter_chain_match": {"destination_port": port}, "filters": [network_filter]}
        for port, network_filter in by_port.items()
    ]
    return {
        "name": where,
        "address": address(where),
        "listener_filters": [{"name": "original_dst", "typed_config": original}],
        "filter_chains": chains,
    }


def _http(route: Json) -> Json:
    router: Json = {
        "@type": _TYPE + "filters.http.router.v3.Router",
        # x-envoy-upstream-service-time would make the answer's size depend on its latency.
        "suppress_envoy_headers": True,
    }
    virtual_host: Json = {"name": "all", "domains": ["*"], "routes": [route]}
    config: Json = {
        "@type": _TYPE + _HCM,
        "stat_prefix": "http",
        "http_filters": [{"name": "router", "typed_config": router}],
        "route_config": {"virtual_hosts": [virtual_host]},
    }
    return {"name": "http", "typed_config": config}
