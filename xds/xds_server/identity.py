"""Who a client proves to be, and whether that is the pod whose configuration it asks for. Pure.

A certificate names a service account (URI SAN `spiffe://TRUST/ns/NAMESPACE/sa/ACCOUNT`, as SPIFFE
and Istio have it) or a pod (DNS SAN `POD.NAMESPACE`); one name that fits is enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from redirector.errors import RedirectorError
from xds_server.ir import Name, NodeId, Workload

DEFAULT_TRUST_DOMAIN = "cluster.local"


class NotPermitted(RedirectorError):  # noqa: N818 - reads as the state it reports
    """The client may not have the configuration of the pod that it names."""


@dataclass(frozen=True)
class Peer:
    """The names in a client's certificate, by their kind."""

    uris: tuple[str, ...] = ()
    dns_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, properties: Mapping[str, Sequence[bytes]]) -> "Peer | None":
        """From gRPC's properties of a connection; None for one that is not encrypted."""
        if "x509_pem_cert" not in properties:
            return None

        def texts(key: str) -> tuple[str, ...]:
            return tuple(value.decode("utf-8", "replace") for value in properties.get(key, ()))

        return cls(texts("peer_uri"), texts("peer_dns"))

    def __str__(self) -> str:
        return ", ".join((*self.uris, *self.dns_names))[:200] or "nobody"


def permit(workloads: Mapping[Name, Workload], trust_domain: str, node: NodeId, peer: Peer) -> None:
    """Return if `peer` is the pod that `node` names, as the mesh's objects have it.

    NotPermitted otherwise: a pod that the mesh does not know (yet), an address that is not the
    pod's, a certificate of another pod or service account.
    """
    name = Name(node.namespace, node.pod)
    workload = workloads.get(name)
    if workload is None:
        raise NotPermitted(f"pod {name}: not in the mesh; a certificate is bound to a known pod")
    addresses = {str(address) for address in workload.addresses}
    if addresses and node.ip not in addresses:
        raise NotPermitted(
            f"pod {name}: its address is {' or '.join(sorted(addresses))}, not {node.ip};"
            " give the pod's own in the node id"
        )
    account = f"spiffe://{trust_domain}/ns/{node.namespace}/sa/{workload.service_account}"
    pod = f"{node.pod}.{node.namespace}"
    if account not in peer.uris and pod not in peer.dns_names:
        raise NotPermitted(
            f"pod {name}: the certificate is that of {peer}; it must name {account} or DNS {pod}"
        )
