"""A sidecar's resources as one static bootstrap: Envoy can be asked without a server."""

import subprocess
from pathlib import Path
from typing import Any

from envoy.config.bootstrap.v3 import bootstrap_pb2
from envoy.config.cluster.v3 import cluster_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as hcm_pb2,
)
from google.protobuf import json_format
from xds_server.translate import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE, Resources

from redirector.machine import envoy_binary

HCM = hcm_pb2.HttpConnectionManager


def bootstrap(resources: Resources) -> Any:
    """An envoy.config.bootstrap.v3.Bootstrap with what ADS would have brought put in its place."""
    result = bootstrap_pb2.Bootstrap()
    for name, cluster in resources[CLUSTER].items():
        copy = result.static_resources.clusters.add()
        copy.CopyFrom(cluster)
        if copy.HasField("eds_cluster_config"):
            copy.ClearField("eds_cluster_config")
            copy.type = cluster_pb2.Cluster.DiscoveryType.STATIC
            copy.load_assignment.CopyFrom(resources[ENDPOINT][name])
    for listener in resources[LISTENER].values():
        copy = result.static_resources.listeners.add()
        copy.CopyFrom(listener)
        for chain in [*copy.filter_chains, copy.default_filter_chain]:
            for part in chain.filters:
                if part.HasField("config_discovery"):
                    found: Any = resources[FILTER][part.name]
                    part.typed_config.CopyFrom(found.typed_config)
                if part.typed_config.Is(HCM.DESCRIPTOR):
                    manager = HCM()
                    part.typed_config.Unpack(manager)
                    manager.route_config.CopyFrom(resources[ROUTE][manager.rds.route_config_name])
                    part.typed_config.Pack(manager, deterministic=True)
    return result


def refused_by_envoy(resources: Resources, folder: Path) -> str:
    """What Envoy has against these resources; empty when it takes all of them."""
    file = folder / "bootstrap.json"
    file.write_text(as_json(bootstrap(resources)))
    command = [str(envoy_binary()), "--mode", "validate", "-c", str(file), "-l", "warn"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.stderr if result.returncode or "deprecated" in result.stderr else ""


def as_json(message: Any) -> str:
    return str(json_format.MessageToJson(message, preserving_proto_field_name=True))
