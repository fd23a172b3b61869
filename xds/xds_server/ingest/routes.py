"""HTTPRoutes and GRPCRoutes whose parent is a Service (GAMMA), and ReferenceGrants."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from xds_server.conditions import Reference
from xds_server.groups import GATEWAY_GROUP
from xds_server.ingest.core import RawService
from xds_server.ingest.reader import DNS_NAME, Field, Item
from xds_server.ingest.route_rules import RuleReader, Unresolved, ports
from xds_server.ir import Name, Parent, Protocol, Route, RouteKind

ROUTE_KINDS = tuple(RouteKind)

_HOSTNAME = re.compile(rf"(\*\.)?{DNS_NAME.pattern}")


@dataclass(frozen=True)
class Grant:
    """`service` None is every service of the namespace."""

    kind: str
    route_namespace: str
    service_namespace: str
    service: str | None


@dataclass(frozen=True)
class Attachment:
    """A parentRef, the service ports it leads to, and if there are none why; `field` is where it
    stands."""

    reference: Reference
    parents: tuple[Parent, ...]
    refused: str
    field: Field


@dataclass(frozen=True, eq=False)
class RouteReading:
    """A route with what its status is made of. `dropped` are the fields for which some of its rules
    are broken, if it is bad for nothing else; `incompatible` tells that it combines filters that
    cannot be combined."""

    item: Item
    route: Route
    attachments: tuple[Attachment, ...]
    unresolved: tuple[Unresolved, ...]
    dropped: tuple[str, ...]
    incompatible: bool


def read_grant(item: Item) -> list[Grant]:
    """What a ReferenceGrant lets routes of other namespaces refer to."""
    froms = [
        (source["kind"].text(), source["namespace"].namespace())
        for source in item.spec["from"].items()
        if source["group"].text() == GATEWAY_GROUP
    ]
    names = [
        target["name"].text() if target["name"].present else None
        for target in item.spec["to"].items()
        if target["group"].text("") == "" and target["kind"].text() == "Service"
    ]
    return [
        Grant(kind, source, item.name.namespace, name)
        for kind, source in froms
        for name in names
        if kind in ROUTE_KINDS
    ]


@dataclass(frozen=True, eq=False)
class RouteReader:
    """Reads routes against the services and grants there are."""

    services: Mapping[Name, RawService]
    grants: Iterable[Grant]

    def read(self, item: Item) -> RouteReading | None:
        """None for a route that has no Service as a parent: it is not the mesh's."""
        spec, kind = item.spec, RouteKind(item.kind)
        parents = spec["parentRefs"].items()
        references = [
            parent
            for parent in parents
            if parent["group"].text(GATEWAY_GROUP) == "" and parent["kind"].value == "Service"
        ]
        if not references:
            return None
        spec.only("parentRefs", "hostnames", "rules")
        attachments = tuple(self._attachment(item, reference) for reference in references)
        hostnames = tuple(sorted({_hostname(host) for host in spec["hostnames"].items()}))
        created = item.root["metadata"]["creationTimestamp"].text("")
        sound = not item.bad
        asked = {
            Name(one.reference.namespace or item.name.namespace, one.reference.name)
            for one in attachments
        }
        rules = RuleReader(item, kind, self.services, lambda name: self._granted(item, name, asked))
        route = Route(
            item.name,
            created,
            tuple(sorted({parent for one in attachments for parent in one.parents})),
            # Beside a Gateway they are what that listens for, which nobody in a mesh asks by.
            hostnames if len(parents) == len(references) else (),
            rules.read(spec["rules"]),
            kind,
        )
        return RouteReading(
            item,
            route,
            attachments,
            tuple(rules.unresolved),
            tuple(rules.dropped) if sound else (),
            rules.incompatible,
        )

    def _attachment(self, item: Item, field: Field) -> Attachment:
        field.only("group", "kind", "namespace", "name", "sectionName", "port")
        section = field["sectionName"].text() if field["sectionName"].present else None
        number = field["port"].port() if field["port"].present else None
        namespace = field["namespace"].namespace() if field["namespace"].present else None
        reference = Reference("", "Service", namespace, field["name"].text(), section, number)
        name = Name(namespace or item.name.namespace, reference.name)
        place, why = "name", ""
        service = self.services.get(name)
        chosen: list[Parent] = []
        if service is None:
            why = f"there is no Service {name}; create it or correct this"
        elif service.external:
            why = f"Service {name} is an ExternalName, by which its traffic could not be told"
        elif not service.addresses:
            why = f"Service {name} has no cluster IP, by which its traffic could be told"
        elif number is None and section is None:
            chosen = [Parent(name, p.number) for p in service.ports if _may_be_http(p.declared)]
            why = f"Service {name} has no HTTP port; set a port's appProtocol to http"
        else:
            place = "sectionName" if number is None else "port"
            found = [
                port
                for port in service.ports
                if number in (None, port.number) and section in (None, port.name)
            ]
            chosen = [Parent(name, port.number) for port in found if _may_be_http(port.declared)]
            why = f"Service {name} has no such port; {ports(service)}"
            if found:
                why = f"that port of Service {name} is not HTTP; set its appProtocol to http"
        if chosen:
            return Attachment(reference, tuple(chosen), "", field)
        if field["name"].present:
            field[place].misfit(why)
        return Attachment(reference, (), why, field)

    def _granted(self, item: Item, service: Name, asked: Collection[Name]) -> bool:
        """`asked` are the Services that the route is for. A consumer's route leads its own clients
        to what they asked for without anybody's leave (GEP-1426, "Namespace boundaries";
        conformance test MeshConsumerRoute); one that is for a Service of its own, too, brings
        others there."""
        own = item.name.namespace
        if service in asked and all(name.namespace != own for name in asked):
            return True
        return own == service.namespace or any(
            grant.kind == item.kind
            and grant.route_namespace == item.name.namespace
            and grant.service_namespace == service.namespace
            and grant.service in (None, service.name)
            for grant in self.grants
        )


def _may_be_http(declared: Protocol | None) -> bool:
    return declared is None or declared.is_http


def _hostname(host: Field) -> str:
    text = host.matching(_HOSTNAME, "a host name such as web.example.com or *.example.com")
    if text.replace(".", "").isdecimal():
        host.problem("must not be an IP address; use a host name")
    return text
