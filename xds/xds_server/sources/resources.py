"""The kinds that are followed at an API server, and what is kept of their objects. Pure.

Of an object only what may be read of it is kept: who wrote which field, what kubectl applied last
and how a pod's containers are doing are most of its bytes. The `read` functions raise ValueError
for what is no object.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from redirector.apiserver.reflector import Resource
from redirector.apiserver.values import mapping
from redirector.model import ANNOTATION
from xds_server.groups import GATEWAY_GROUP, POLICY_GROUP, POLICY_VERSION
from xds_server.ir import Name
from xds_server.sources.objects import KubeObject

#: What stands for the file in messages.
ORIGIN = "API server"
#: A server that lists none of the objects that it had is believed after so long, in seconds.
HOLD = 60.0
_PAGE = 500
_FOREIGN_METADATA = frozenset(
    ("managedFields", "resourceVersion", "ownerReferences", "finalizers", "annotations")
)
_CONTAINER = ("name", "ports", "restartPolicy")
_POD_SPEC = ("serviceAccountName", "hostNetwork", "nodeName", "hostname", "subdomain")
_POD_STATUS = ("phase", "podIP", "podIPs")


@dataclass(frozen=True)
class ApiObject:
    """An object as the API server told it last; two are equal when nothing that is kept differs."""

    full_name: str
    data: dict[str, object]
    source: KubeObject = field(compare=False)
    #: For objects whose status is ours to write: as it stands, and the version that it belongs to.
    status: Mapping[str, Any] | None = None
    version: str = ""

    @property
    def name(self) -> Name:
        """Its namespace ("" for none) and name."""
        namespace, _, name = self.full_name.rpartition("/")
        return Name(namespace, name)

    @property
    def generation(self) -> object:
        """Which state of its spec this is: metadata.generation, if it has one."""
        metadata = self.data["metadata"]
        return metadata.get("generation") if isinstance(metadata, dict) else None


@dataclass(frozen=True)
class Kind:
    """A kind and how the API server calls it; `group` "" is the core group."""

    kind: str
    group: str
    version: str
    plural: str
    keep: Callable[[dict[str, Any]], dict[str, Any]] = lambda value: value
    metadata_only: bool = False
    #: It comes with a CustomResourceDefinition, which may be missing.
    custom: bool = False
    #: We write conditions to its status.
    told: bool = False

    @property
    def api_version(self) -> str:
        """As objects name it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """Where the API group is served."""
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"

    def resource(self) -> Resource[ApiObject]:
        """What is listed and watched."""
        return Resource(
            f"{self.root}/{self.plural}",
            self._read,
            {},
            metadata_only=self.metadata_only,
            optional=self.custom,
            hold=HOLD,
            page=_PAGE,
        )

    def status_path(self, namespace: str, name: str) -> str:
        """Where an object's status is patched."""
        return f"{self.root}/namespaces/{namespace}/{self.plural}/{name}/status"

    def _read(self, value: Mapping[str, Any]) -> ApiObject:
        given = mapping(value, "metadata")
        metadata = {
            key: part
            for key, part in given.items()
            # What every write changes is no change of the object.
            if key not in _FOREIGN_METADATA
        }
        # Annotations may hold whole objects and change all the time: ours alone.
        annotations = {
            key: text
            for key, text in mapping(given, "annotations").items()
            if key.startswith(ANNOTATION)
        }
        if annotations:
            metadata["annotations"] = annotations
        name, namespace = metadata.get("name"), metadata.get("namespace")
        if not isinstance(name, str) or not name:
            raise ValueError(f"metadata.name: {name!r:.60} is not a name")
        # Lists of built-in kinds leave out what the list says already.
        data = {
            **self.keep(dict(value)),
            "apiVersion": self.api_version,
            "kind": self.kind,
            "metadata": metadata,
        }
        status = None
        if self.told:
            data.pop("status", None)
            # Whatever stands there, it keeps nobody from reading the object.
            found = value.get("status")
            status = found if isinstance(found, dict) else {}
        return ApiObject(
            f"{namespace}/{name}" if namespace else name,
            data,
            KubeObject(ORIGIN, data),
            status,
            str(given.get("resourceVersion", "")) if self.told else "",
        )


def _only(value: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value[name] for name in names if name in value}


def _pod(value: dict[str, Any]) -> dict[str, Any]:
    spec = mapping(value, "spec")
    kept = _only(spec, _POD_SPEC)
    for name in ("containers", "initContainers"):
        if isinstance(spec.get(name), list):
            kept[name] = [
                _only(entry, _CONTAINER) if isinstance(entry, dict) else entry
                for entry in spec[name]
            ]
    return {"spec": kept, "status": _only(mapping(value, "status"), _POD_STATUS)}


def _service(value: dict[str, Any]) -> dict[str, Any]:
    return {"spec": mapping(value, "spec")}


def _nothing(_value: dict[str, Any]) -> dict[str, Any]:
    return {}


_POLICY_VERSION = POLICY_VERSION.removeprefix(f"{POLICY_GROUP}/")
KINDS = (
    Kind("Namespace", "", "v1", "namespaces", _nothing, metadata_only=True),
    Kind("Node", "", "v1", "nodes", _nothing, metadata_only=True),
    Kind("Pod", "", "v1", "pods", _pod),
    Kind("Service", "", "v1", "services", _service),
    Kind("EndpointSlice", "discovery.k8s.io", "v1", "endpointslices"),
    Kind("HTTPRoute", GATEWAY_GROUP, "v1", "httproutes", custom=True, told=True),
    Kind("GRPCRoute", GATEWAY_GROUP, "v1", "grpcroutes", custom=True, told=True),
    Kind("ReferenceGrant", GATEWAY_GROUP, "v1beta1", "referencegrants", custom=True),
    Kind(
        "AuthorizationPolicy",
        POLICY_GROUP,
        _POLICY_VERSION,
        "authorizationpolicies",
        custom=True,
        told=True,
    ),
    Kind("TrafficPolicy", POLICY_GROUP, _POLICY_VERSION, "trafficpolicies", custom=True, told=True),
)
