"""Sidecars that pass everything on to its original destination, in both directions.

A static configuration: what the traffic tests prove is the way of the bytes, not the control plane.
Field names: envoy.config.bootstrap.v3.Bootstrap.
"""

import http.client
import json
from collections.abc import Sequence
from pathlib import Path

from sockets import pod_socket
from waiting import eventually

from redirector.compare.envoy import proxy_bytes
from redirector.datapath.listeners import listening_sockets
from redirector.lab import LabPod
from redirector.machine import envoy_binary

Json = str | int | bool | list["Json"] | dict[str, "Json"]

OUTBOUND, INBOUND, ADMIN = 15001, 15006, 15000
#: Connections to this port are spoken as HTTP; all others are passed on as bytes.
HTTP_PORT = 80
_TYPE = "type.googleapis.com/envoy.extensions."


class Passthrough:
    """A running sidecar. Made by `start_sidecar`."""

    def __init__(
        self, pod: LabPod, log: Path, restarts: Sequence[str | Path] = ("--disable-hot-restart",)
    ) -> None:
        self._pod = pod
        self._log = log
        argv: list[str | Path] = [envoy_binary(), "--config-yaml", json.dumps(_bootstrap(pod.name))]
        argv += ["--concurrency", "1", "--log-level", "warning", *restarts]
        with log.open("ab") as output:
            self.process = pod.popen(argv, sidecar=True, stdout=output, stderr=output)

    def listens(self) -> bool:
        """Whether both listeners are there; an assertion if Envoy has ended instead."""
        assert self.process.poll() is None, f"Envoy ended:\n{self._log.read_text()}"
        return all(_listens(self._pod, port) for port in (OUTBOUND, INBOUND))

    def stats(self) -> dict[str, int]:
        """What Envoy itself has counted of connections that it passed on as bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", ADMIN)
        connection.sock = pod_socket(self._pod)
        connection.sock.connect(("127.0.0.1", ADMIN))
        try:
            connection.request("GET", "/stats?format=json&filter=^tcp%5C.")
            found = json.load(connection.getresponse())["stats"]
        finally:
            connection.close()
        return {each["name"]: each["value"] for each in found if "name" in each}


def start_sidecar(pod: LabPod, directory: Path) -> Passthrough:
    """An Envoy in the pod as the sidecar's user; listens when this returns."""
    sidecar = Passthrough(pod, directory / f"{pod.name}.log")
    eventually("the sidecar's listeners", sidecar.listens)
    return sidecar


def _listens(pod: LabPod, port: int) -> bool:
    with listening_sockets(pod.netns, pod.sidecar, port) as found:
        return bool(found)


def _bootstrap(name: str) -> Json:
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": ADMIN}}},
        "static_resources": {
            "listeners": [
                _listener("outbound", OUTBOUND, f"{name}-outbound"),
                _listener("inbound", INBOUND, f"{name}-inbound"),
            ],
            "clusters": [
                _original_destination("outbound"),
                # As this address the sidecar hands a connection to its application.
                _original_destination("inbound", bind="127.0.0.6"),
            ],
        },
    }


def _listener(cluster: str, port: int, via: str) -> Json:
    original: Json = {"@type": _TYPE + "filters.listener.original_dst.v3.OriginalDst"}
    return {
        "name": cluster,
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
        "listener_filters": [{"name": "original_dst", "typed_config": original}],
        "filter_chains": [
            {
                "filter_chain_match": {"destination_port": HTTP_PORT},
                "filters": [_http(cluster, via)],
            }
        ],
        "default_filter_chain": {"filters": [proxy_bytes(cluster)]},
    }


def _http(cluster: str, via: str) -> Json:
    router: Json = {"@type": _TYPE + "filters.http.router.v3.Router"}
    route: Json = {"match": {"prefix": "/"}, "route": {"cluster": cluster}}
    config: Json = {
        "@type": _TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": cluster,
        # Both the request and the answer then say which listeners they went through.
        "via": via,
        "http_filters": [{"name": "router", "typed_config": router}],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    }
    return {"name": "http", "typed_config": config}


def _original_destination(name: str, bind: str = "") -> Json:
    cluster: dict[str, Json] = {
        "name": name,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
    }
    if bind:
        cluster["upstream_bind_config"] = {"source_address": {"address": bind, "port_value": 0}}
    return cluster
