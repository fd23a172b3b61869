"""Services with their endpoints, and workloads."""

from dataclasses import dataclass

from redirector.model import IPAddress
from xds_server.ir.names import Name, Protocol


@dataclass(frozen=True, order=True)
class Endpoint:
    """A place that serves a port of a service. `zone` is where it is; `near` are the zones whose
    clients it is meant for before others, none when it is for everybody alike; `nodes` likewise."""

    address: IPAddress
    port: int
    zone: str = ""
    near: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServicePort:
    """A TCP port of a service; `endpoints` are those that traffic may go to now, sorted."""

    number: int
    protocol: Protocol
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True)
class Service:
    """`addresses` are its cluster IPs; a headless service has none. An ExternalName has a
    `hostname` instead, and no endpoints. With `affinity` a client's connections all go to one
    endpoint. In `zones`, and on `nodes`, clients have endpoints that are meant for them; of one
    that is `local` they reach no others than their node's."""

    name: Name
    addresses: tuple[IPAddress, ...]
    ports: tuple[ServicePort, ...]
    hostname: str = ""
    affinity: bool = False
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    local: bool = False


@dataclass(frozen=True)
class AppPort:
    """A port that a pod's application listens on."""

    number: int
    protocol: Protocol


@dataclass(frozen=True)
class Scope:
    """The services that a sidecar is told of: those of its own namespace, of these namespaces, and
    these."""

    namespaces: frozenset[str] = frozenset()
    services: frozenset[Name] = frozenset()
    everything: bool = False


EVERYTHING = Scope(everything=True)


@dataclass(frozen=True)
class Workload:
    """A pod that runs or is about to. If it is `closed`, its application reaches services only."""

    name: Name
    addresses: tuple[IPAddress, ...] = ()
    ports: tuple[AppPort, ...] = ()
    service_account: str = "default"
    zone: str = ""
    scope: Scope = EVERYTHING
    closed: bool = False
    node: str = ""
