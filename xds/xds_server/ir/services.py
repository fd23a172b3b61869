"""Services with their endpoints, and workloads."""

from dataclasses import dataclass

from redirector.model import IPAddress
from xds_server.ir.names import Name, Protocol


@dataclass(frozen=True, order=True)
class Endpoint:
    """A place that serves a port of a service."""

    address: IPAddress
    port: int


@dataclass(frozen=True)
class ServicePort:
    """A TCP port of a service; `endpoints` are those that traffic may go to now, sorted."""

    number: int
    protocol: Protocol
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True)
class Service:
    """`addresses` are its cluster IPs; a headless service has none."""

    name: Name
    addresses: tuple[IPAddress, ...]
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True)
class AppPort:
    """A port that a pod's application listens on."""

    number: int
    protocol: Protocol


@dataclass(frozen=True)
class Workload:
    """A pod that runs or is about to."""

    name: Name
    addresses: tuple[IPAddress, ...] = ()
    ports: tuple[AppPort, ...] = ()
    service_account: str = "default"
