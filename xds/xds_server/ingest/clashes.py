"""Two routes that want the same requests: which one wins would be chance to their authors."""

from collections.abc import Iterable

from xds_server.ingest.reader import Field, Item
from xds_server.ir import Parent, Route, RouteMatch

_Key = tuple[Parent, str, str, RouteMatch]


def clashes(routes: Iterable[tuple[Item, Route]]) -> None:
    """Reports each pair of routes that are attached to one service port, for the same clients, with
    a match and a host name in common. Within one route the first rule wins, as the Gateway API has
    it."""
    taken: dict[_Key, tuple[Item, Field]] = {}
    for item, route in sorted(routes, key=lambda pair: pair[1].name):
        reported: set[str] = set()
        for field, key in _claims(item, route):
            other, place = taken.setdefault(key, (item, field))
            if other is item or other.subject in reported:
                continue
            reported.add(other.subject)
            field.misfit(
                f"clashes with {other.subject} ({other.file}, {place.path}): both take "
                f"the same requests to port {key[0].port} of Service {key[0].service}; change the "
                "match of one of them"
            )


def _claims(item: Item, route: Route) -> Iterable[tuple[Field, _Key]]:
    fields = item.spec["rules"].items()
    for parent in route.parents:
        consumer = item.name.namespace if item.name.namespace != parent.service.namespace else ""
        for hostname in route.hostnames or ("",):
            for field, rule in zip(fields, route.rules, strict=True):
                for match in rule.matches:
                    yield field, (parent, consumer, hostname, match)
