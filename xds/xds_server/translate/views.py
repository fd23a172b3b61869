"""The services that sidecars are told of: each kind of scope is worked out once."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from xds_server.ir import Name, Parent, Protocol, Scope, Service
from xds_server.memo import Memo

Row = tuple[Service, ...]
#: What some clients are told of service ports, for which nothing was said to all.
Said = frozenset[tuple[Parent, Protocol]]


@dataclass(frozen=True, eq=False)
class View:
    """Rows of services: whole, and without their endpoints, which change often and concern nothing
    but themselves. Sidecars that see the same share the very same rows."""

    services: Row
    bare: Row


class Views:
    """All services of a mesh, to be looked at in part."""

    def __init__(
        self,
        services: Mapping[Name, Service],
        memo: Memo,
        asked: Mapping[str, Collection[Name]] | None = None,
    ) -> None:
        """`asked` are services that a namespace has routes of its own for, which are in its scope
        then."""
        self._memo = memo
        self._asked = asked or {}
        self._services = services
        found = defaultdict(list)
        for name, service in services.items():
            found[name.namespace].append(service)
        self._namespaces = {name: self._view(row) for name, row in sorted(found.items())}
        self._seen: dict[tuple[Scope, str], View] = {}
        self.everything = self._joined(self._namespaces.values())

    @property
    def namespaces(self) -> Collection[str]:
        """Those that have services."""
        return self._namespaces.keys()

    def of(self, scope: Scope, namespace: str) -> View:
        """What a sidecar of this namespace and scope is told of."""
        if scope.everything:
            return self.everything
        key = (scope, namespace)
        if key not in self._seen:
            self._seen[key] = self._made(scope, namespace)
        return self._seen[key]

    def _made(self, scope: Scope, namespace: str) -> View:
        included = {namespace, *scope.namespaces}
        named = {*scope.services, *self._asked.get(namespace, ())}
        single = (name for name in named if name.namespace not in included)
        views = [view for name, view in self._namespaces.items() if name in included]
        return self._joined([*views, *self._singles(single)])

    def with_more(self, view: View, names: Iterable[Name]) -> View:
        """The same and these services, too, as far as they are there."""
        return self._joined([view, *self._singles(names)])

    def heard(self, services: Row, said: Said) -> Row:
        """The same services, as clients see them who are told this of ports, too."""
        return self._memo(self._heard, services, self._memo.value(said)) if said else services

    def _heard(self, services: Row, said: Said) -> Row:
        told = dict(said)
        return self._memo.row(self._told(service, told) for service in services)

    def _told(self, service: Service, told: Mapping[Parent, Protocol]) -> Service:
        ports = tuple(
            replace(port, protocol=told.get(Parent(service.name, port.number), port.protocol))
            if port.protocol is Protocol.TCP
            else port
            for port in service.ports
        )
        if ports == service.ports:
            return service
        return self._memo.value(replace(service, ports=ports))

    def _singles(self, names: Iterable[Name]) -> list[View]:
        found = [self._services[name] for name in sorted(names) if name in self._services]
        return [self._view(found)] if found else []

    def _view(self, services: Iterable[Service]) -> View:
        row = self._memo.row(services)
        return View(row, self._memo(self._bare_row, row))

    def _joined(self, views: Iterable[View]) -> View:
        parts = list(views)
        return View(
            self._memo(_joined, *(view.services for view in parts)),
            self._memo(_joined, *(view.bare for view in parts)),
        )

    def _bare_row(self, services: Row) -> Row:
        return self._memo.row(self._memo(self._bared, service) for service in services)

    def _bared(self, service: Service) -> Service:
        ports = tuple(replace(port, endpoints=()) for port in service.ports)
        return self._memo.value(replace(service, ports=ports, zones=(), nodes=()))


def _joined(*rows: Row) -> Row:
    return tuple(service for row in rows for service in row)
