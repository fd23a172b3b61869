"""The bootstrap of a sidecar's Envoy: who it is, where the xDS server is, nothing else.

All that Envoy serves comes over delta ADS. Field names: envoy.config.bootstrap.v3.Bootstrap.
"""

import re
from ipaddress import ip_address

from redirector.errors import InputError

#: A JSON value as `json.dumps` takes it.
Json = str | int | bool | list["Json"] | dict[str, "Json"]

XDS_CLUSTER = "xds"
_UNIX = "unix:"
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_NO_LIMIT = 2**32 - 1


def node_id(pod: str, namespace: str, ip: str) -> str:
    """Return who the sidecar says it is; the xDS server finds its pod by it."""
    return f"sidecar~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"


def bootstrap(
    pod: str, namespace: str, ip: str, *, xds: str, admin_port: int = 15000
) -> dict[str, Json]:
    """Return the bootstrap as a JSON object.

    `xds` is the xDS server: `unix:/path/to/socket`, `host:port` or `[v6]:port`. The admin
    interface listens on 127.0.0.1:`admin_port` (0: any free port). InputError on a wrong value.
    """
    _check_name("pod", pod)
    _check_name("namespace", namespace)
    try:
        ip_address(ip)
    except ValueError:
        raise InputError(
            f"bootstrap: ip: {ip!r} is not an IP address; give the pod's own"
        ) from None
    if not 0 <= admin_port <= 65535:
        raise InputError(f"bootstrap: admin port: {admin_port} is not in 0-65535")
    return {
        "node": {"id": node_id(pod, namespace, ip), "cluster": f"{pod}.{namespace}"},
        "admin": {"address": _socket_address("127.0.0.1", admin_port)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                # Envoy's node is 61 kB; without this every request and ACK carries it.
                "set_node_on_first_message_only": True,
                "grpc_services": [{"envoy_grpc": {"cluster_name": XDS_CLUSTER}}],
            },
            "cds_config": _ads_source(),
            "lds_config": _ads_source(),
        },
        "static_resources": {"clusters": [_xds_cluster(xds)]},
        # Envoy's default refuses regular expressions of more than 100 RE2 instructions, and with
        # them the whole resource: a policy with a token of 100 letters would never hold.
        "layered_runtime": {
            "layers": [
                {
                    "name": "limits",
                    "static_layer": {
                        "re2.max_program_size.error_level": _NO_LIMIT,
                        "re2.max_program_size.warn_level": _NO_LIMIT,
                    },
                }
            ]
        },
        "stats_config": {"use_all_default_tags": True},
        # No stats sink is configured: flush when somebody asks, not every five seconds.
        "stats_flush_on_admin": True,
    }


def _check_name(field: str, value: str) -> None:
    if not _DNS_NAME.fullmatch(value):
        raise InputError(
            f"bootstrap: {field}: {value!r} is not a Kubernetes name;"
            " use lower case letters, digits, '-' and '.'"
        )


def _ads_source() -> dict[str, Json]:
    # Without the zero, a sidecar that waited 15 s for its server calls itself ready with nothing.
    return {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}


def _socket_address(host: str, port: int) -> dict[str, Json]:
    return {"socket_address": {"address": host, "port_value": port}}


def _xds_cluster(xds: str) -> dict[str, Json]:
    discovery, address = _xds_address(xds)
    endpoint: Json = {"endpoint": {"address": address}}
    cluster: dict[str, Json] = {
        "name": XDS_CLUSTER,
        "type": discovery,
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": XDS_CLUSTER,
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: {
                "@type": f"type.googleapis.com/{_HTTP_OPTIONS}",
                "explicit_http_config": {
                    # A server that vanished without a FIN must not leave the sidecar waiting.
                    "http2_protocol_options": {
                        "connection_keepalive": {"interval": "30s", "timeout": "5s"}
                    }
                },
            }
        },
    }
    if "pipe" not in address:
        cluster["upstream_connection_options"] = {
            "tcp_keepalive": {"keepalive_time": 30, "keepalive_interval": 5, "keepalive_probes": 3}
        }
    return cluster


def _xds_address(xds: str) -> tuple[str, dict[str, Json]]:
    """Return the cluster's discovery type and its address."""
    if xds.startswith(_UNIX):
        # gRPC's two spellings of an absolute path: unix:/path and unix:///path.
        path = xds.removeprefix(_UNIX)
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path.startswith("/") or path.startswith("//"):
            raise _bad_xds(xds)
        # sun_path of unix(7) holds 108 bytes with the final zero.
        if len(path.encode()) > 107:
            raise InputError(f"bootstrap: xds: {xds!r}: a socket's path has at most 107 bytes")
        return "STATIC", {"pipe": {"path": path}}
    host, _, port = xds.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise _bad_xds(xds)
    try:
        version = ip_address(host).version
    except ValueError:
        if bracketed or not _DNS_NAME.fullmatch(host):
            raise _bad_xds(xds) from None
        return "STRICT_DNS", _socket_address(host, int(port))
    if bracketed != (version == 6):
        raise _bad_xds(xds)
    return "STATIC", _socket_address(host, int(port))


def _bad_xds(xds: str) -> InputError:
    return InputError(
        f"bootstrap: xds: {xds!r} is not an address; use unix:/path, host:port or [v6]:port"
    )
