"""What others than the application ask of a sidecar: is it ready, and its metrics.

The admin interface listens on loopback only; of all that it can do, these two listeners pass on one
path each. Inbound steering leaves their ports alone by default (model.Steering).
Field names: envoy.config.listener.v3.Listener.
"""

from redirector.bootstrap.values import Json, socket_address

READY_PORT, STATS_PORT = 15021, 15090
#: As Istio's sidecars are asked.
READY_PATH, STATS_PATH = "/healthz/ready", "/stats/prometheus"
_CLUSTER = "admin"
_EXTENSIONS = "type.googleapis.com/envoy.extensions.filters"


def listeners(ip: str, ready_port: int, stats_port: int) -> list[Json]:
    """Listeners on the pod's own address; none for a port of 0.

    Envoy opens them when it has its first configuration, so being there means being ready.
    """
    asked = ((ready_port, READY_PATH, "/ready"), (stats_port, STATS_PATH, STATS_PATH))
    return [_listener(ip, port, path, to) for port, path, to in asked if port]


def cluster(admin_port: int) -> Json:
    """The admin interface."""
    address = socket_address("127.0.0.1", admin_port)
    endpoint: Json = {"endpoint": {"address": address}}
    return {
        "name": _CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": _CLUSTER,
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
    }


def _listener(ip: str, port: int, path: str, to: str) -> Json:
    route: Json = {
        "match": {"path": path},
        "route": {"cluster": _CLUSTER, "prefix_rewrite": to},
    }
    manager: Json = {
        "@type": f"{_EXTENSIONS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": _CLUSTER,
        "route_config": {
            "virtual_hosts": [{"name": _CLUSTER, "domains": ["*"], "routes": [route]}]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{_EXTENSIONS}.http.router.v3.Router"},
            }
        ],
    }
    return {
        "name": path,
        "address": socket_address(ip, port),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
