"""What everything else is called by, and the ports and protocols that all rooms know."""

import re
from enum import StrEnum
from ipaddress import ip_address
from typing import NamedTuple

from redirector.errors import InputError

#: The sidecar's own listeners (names and numbers follow Istio's).
OUTBOUND_PORT = 15001
INBOUND_PORT = 15006


class Protocol(StrEnum):
    """What Envoy must understand of a port's traffic."""

    HTTP = "http"
    HTTP2 = "http2"
    TCP = "tcp"

    @property
    def is_http(self) -> bool:
        return self is not Protocol.TCP


class Name(NamedTuple):
    """A namespaced object's name. A tuple, since most of what is looked up is looked up by it."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


_NODE_ID = re.compile(
    # Names as Kubernetes has them: they stand in logs, in tables and in each state of the mesh.
    r"sidecar~(?P<ip>[0-9A-Fa-f.:]{2,45})~(?P<pod>[-a-z0-9.]{1,253})\.(?P<namespace>[-a-z0-9]{1,63})"
    r"~(?P=namespace)\.svc\.[^~]+"
)


class Client(StrEnum):
    """What kind of program asks, since not all understand the same."""

    ENVOY = "envoy"
    GRPC = "grpc"


class NodeId(NamedTuple):
    """Who a client says it is: the sidecar of a pod, or a gRPC program in it."""

    ip: str
    pod: str
    namespace: str
    client: Client = Client.ENVOY

    @classmethod
    def parse(cls, text: str, user_agent: str = "") -> "NodeId":
        """Reads `sidecar~10.0.0.1~web-v1.demo~demo.svc.cluster.local` (Istio's form); InputError
        otherwise. gRPC's own clients are told by their user agent, such as `gRPC C-core linux`."""
        client = Client.GRPC if user_agent.startswith("gRPC ") else Client.ENVOY
        found = _NODE_ID.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            return cls(str(ip_address(found["ip"])), found["pod"], found["namespace"], client)
        except ValueError:
            raise InputError(
                f"node id {text[:200]!r}: must look like "
                "'sidecar~10.0.0.1~POD.NAMESPACE~NAMESPACE.svc.cluster.local'"
            ) from None
