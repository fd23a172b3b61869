"""Kubernetes objects, cut down to what the agent needs of them. Pure.

The `read_` functions take an object as the API server sends it and raise ValueError when it is not
one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from redirector.apiserver.values import mapping
from redirector.model import ANNOTATION, IPAddress

#: On the mirror of a static pod: the UID by which the kubelet knows it (kubetypes).
_MIRROR = "kubernetes.io/config.mirror"
_FINISHED = ("Succeeded", "Failed")


@dataclass(frozen=True)
class PodObject:
    """A pod as the API server tells of it."""

    namespace: str
    name: str
    uid: str
    node: str = ""
    #: Ours only, without the prefix.
    annotations: Mapping[str, str] = field(default_factory=dict)
    host_network: bool = False
    #: Whether its containers have ended for good.
    finished: bool = False
    #: Whether at least one of them runs.
    running: bool = False
    addresses: tuple[IPAddress, ...] = ()
    #: Of the static pod that this is the mirror of.
    mirrored: str = ""

    @property
    def full_name(self) -> str:
        """The name of its record."""
        return f"{self.namespace}/{self.name}"

    @property
    def kubelet_uid(self) -> str:
        """The UID by which the kubelet knows it, and names its cgroup.

        A static pod keeps it when its mirror is deleted and made anew.
        """
        return self.mirrored or self.uid


@dataclass(frozen=True)
class NamespaceObject:
    """A namespace."""

    name: str
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """What tells it from others of its kind."""
        return self.name


def read_pod(value: Mapping[str, Any]) -> PodObject:
    """A v1 Pod."""
    metadata = mapping(value, "metadata")
    spec, status = mapping(value, "spec"), mapping(value, "status")
    return PodObject(
        namespace=_text(metadata, "namespace"),
        name=_text(metadata, "name"),
        uid=_text(metadata, "uid"),
        node=str(spec.get("nodeName", "")),
        annotations=_annotations(metadata),
        host_network=spec.get("hostNetwork") is True,
        finished=status.get("phase") in _FINISHED,
        running=status.get("phase") == "Running",
        addresses=_addresses(status),
        mirrored=str(mapping(metadata, "annotations").get(_MIRROR) or ""),
    )


def read_namespace(value: Mapping[str, Any]) -> NamespaceObject:
    """A v1 Namespace, or its metadata alone."""
    metadata = mapping(value, "metadata")
    return NamespaceObject(_text(metadata, "name"), _annotations(metadata))


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise ValueError(f"metadata.{name}: {found!r:.60} is not a name")
    return found


def _annotations(metadata: Mapping[str, Any]) -> Mapping[str, str]:
    return {
        name.removeprefix(ANNOTATION): str(value)
        for name, value in mapping(metadata, "annotations").items()
        if name.startswith(ANNOTATION)
    }


def _addresses(status: Mapping[str, Any]) -> tuple[IPAddress, ...]:
    entries = status.get("podIPs") or []
    if not isinstance(entries, list):
        raise ValueError(f"status.podIPs: {entries!r:.60} is not a list")
    return tuple(ip_address(entry["ip"]) for entry in entries if isinstance(entry, dict))
