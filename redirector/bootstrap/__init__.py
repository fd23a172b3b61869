"""The bootstrap of a sidecar's Envoy: who it is, where the xDS server is, nothing else.

All that Envoy serves comes over delta ADS. Field names: envoy.config.bootstrap.v3.Bootstrap.
"""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from redirector.bootstrap import outside
from redirector.bootstrap.values import Json, socket_address
from redirector.errors import InputError

XDS_CLUSTER = "xds"
_UNIX = "unix:"
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_TLS = "envoy.extensions.transport_sockets.tls.v3"
_NO_LIMIT = 2**32 - 1


@dataclass(frozen=True)
class XdsTls:
    """How the sidecar proves who it is to the xDS server, and the server to it; PEM files.

    `server_name` is the DNS name or address that the server's certificate must have. With
    `sds_directory`, two files there name the PEM files, and Envoy reads these again when they
    change; without it, only when it starts.
    """

    ca: Path
    certificate: Path
    key: Path
    server_name: str
    sds_directory: Path | None = None

    def __post_init__(self) -> None:
        for field, path in (
            ("xds CA", self.ca),
            ("xds certificate", self.certificate),
            ("xds key", self.key),
            ("SDS directory", self.sds_directory),
        ):
            if path is not None and not path.is_absolute():
                raise InputError(f"bootstrap: {field}: {str(path)!r}: give an absolute path")


def node_id(pod: str, namespace: str, ip: str) -> str:
    """Return who the sidecar says it is; the xDS server finds its pod by it."""
    return f"sidecar~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"


def bootstrap(
    pod: str,
    namespace: str,
    ip: str,
    *,
    xds: str,
    admin_port: int = 15000,
    tls: XdsTls | None = None,
    ready_port: int = 0,
    stats_port: int = 0,
) -> dict[str, Json]:
    """Return the bootstrap as a JSON object.

    `xds` is the xDS server: `unix:/path/to/socket`, `host:port` or `[v6]:port`. The admin
    interface listens on 127.0.0.1:`admin_port` (0: any free port). `tls` is for TCP addresses.
    On the pod's address, `ready_port` tells whether Envoy is ready, `stats_port` its metrics (0: no
    such listener). InputError on a wrong value.
    """
    _check_name("pod", pod)
    _check_name("namespace", namespace)
    try:
        ip_address(ip)
    except ValueError:
        raise InputError(
            f"bootstrap: ip: {ip!r} is not an IP address; give the pod's own"
        ) from None
    ports = {"admin": admin_port, "ready": ready_port, "stats": stats_port}
    for field, port in ports.items():
        if not 0 <= port <= 65535:
            raise InputError(f"bootstrap: {field} port: {port} is not in 0-65535")
    given = [port for port in ports.values() if port]
    if len(set(given)) != len(given):
        raise InputError(f"bootstrap: ports {given}: each is for one listener; give others")
    clusters: list[Json] = [_xds_cluster(xds, tls)]
    listeners = outside.listeners(ip, ready_port, stats_port)
    if listeners:
        if not admin_port:
            raise InputError("bootstrap: admin port: 0 is no port for others to find; name one")
        clusters.append(outside.cluster(admin_port))
    return {
        "node": {"id": node_id(pod, namespace, ip), "cluster": f"{pod}.{namespace}"},
        "admin": {"address": socket_address("127.0.0.1", admin_port)},
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
        "static_resources": {"clusters": clusters, "listeners": listeners},
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


def _xds_cluster(xds: str, tls: XdsTls | None) -> dict[str, Json]:
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
    if tls is not None:
        if "pipe" in address:
            raise InputError(f"bootstrap: xds: {xds!r}: a Unix socket has no TLS; leave it out")
        cluster["transport_socket"] = _tls_socket(tls)
    if "pipe" not in address:
        cluster["upstream_connection_options"] = {
            "tcp_keepalive": {"keepalive_time": 30, "keepalive_interval": 5, "keepalive_probes": 3}
        }
    return cluster


def _tls_socket(tls: XdsTls) -> dict[str, Json]:
    try:
        ip_address(tls.server_name)
        kind = "IP_ADDRESS"
    except ValueError:
        kind = "DNS"
    name: Json = {"san_type": kind, "matcher": {"exact": tls.server_name}}
    server: dict[str, Json] = {"match_typed_subject_alt_names": [name]}
    context: dict[str, Json]
    if tls.sds_directory is None:
        context = {
            "tls_certificates": [_client_certificate(tls)],
            "validation_context": {**server, **_trusted(tls)},
        }
    else:
        certificate, trust = (_sds_source(path) for path in sds_files(tls))
        context = {
            "tls_certificate_sds_secret_configs": [certificate],
            "combined_validation_context": {
                "default_validation_context": server,
                "validation_context_sds_secret_config": trust,
            },
        }
    # Names only: an address is no SNI (RFC 6066, section 3).
    sni: dict[str, Json] = {"sni": tls.server_name} if kind == "DNS" else {}
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"type.googleapis.com/{_TLS}.UpstreamTlsContext",
            "common_tls_context": context,
            **sni,
        },
    }


def sds_files(tls: XdsTls) -> dict[Path, Json]:
    """The files that `sds_directory` must hold, with their content."""
    assert tls.sds_directory is not None
    kind = f"type.googleapis.com/{_TLS}.Secret"
    watched: dict[str, Json] = {"watched_directory": {"path": str(tls.certificate.parent)}}
    ca_watched: dict[str, Json] = {"watched_directory": {"path": str(tls.ca.parent)}}
    secrets: dict[str, dict[str, Json]] = {
        "xds-certificate": {"tls_certificate": {**_client_certificate(tls), **watched}},
        "xds-ca": {"validation_context": {**_trusted(tls), **ca_watched}},
    }
    return {
        tls.sds_directory / f"{name}.json": {"resources": [{"@type": kind, "name": name, **secret}]}
        for name, secret in secrets.items()
    }


def _sds_source(path: Path) -> dict[str, Json]:
    source: Json = {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}
    return {"name": path.stem, "sds_config": source}


def _client_certificate(tls: XdsTls) -> dict[str, Json]:
    return {
        "certificate_chain": {"filename": str(tls.certificate)},
        "private_key": {"filename": str(tls.key)},
    }


def _trusted(tls: XdsTls) -> dict[str, Json]:
    return {"trusted_ca": {"filename": str(tls.ca)}}


def xds_host(xds: str) -> str:
    """The host of the xDS server's address; for a Unix socket, nothing."""
    if xds.startswith(_UNIX):
        return ""
    return xds.rpartition(":")[0].removeprefix("[").removesuffix("]")


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
        return "STRICT_DNS", socket_address(host, int(port))
    if bracketed != (version == 6):
        raise _bad_xds(xds)
    return "STATIC", socket_address(host, int(port))


def _bad_xds(xds: str) -> InputError:
    return InputError(
        f"bootstrap: xds: {xds!r} is not an address; use unix:/path, host:port or [v6]:port"
    )
