"""An object's status, with what every one has."""

from xds_server.conditions import Condition, ObjectStatus, ParentStatus
from xds_server.ingest.reader import Item


def object_status(
    item: Item,
    conditions: tuple[Condition, ...] = (),
    parents: tuple[ParentStatus, ...] = (),
    *,
    told: Item | None = None,
) -> ObjectStatus:
    """The status of an object; `told` is the form that it speaks of, if that is not `item`."""
    version = item.root["apiVersion"].value
    generation = (told or item).root["metadata"]["generation"].value
    return ObjectStatus(
        version if isinstance(version, str) else "",
        item.kind,
        item.name.namespace,
        item.name.name,
        generation if isinstance(generation, int) else None,
        conditions,
        parents,
    )
