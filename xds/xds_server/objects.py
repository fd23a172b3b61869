"""What became of the objects, for the operator: a method beside CSDS on the admin address. Pure.

A directory of manifests has no API server to keep its objects' status, so the server tells it; of
the same values that are written into a cluster's objects. An answer is JSON, in those words.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from xds_server.conditions import Condition, ObjectStatus, ParentStatus, Reference
from xds_server.statuses import flat, is_good

SERVICE, FETCH = "redirector.xds.ObjectStatusService", "FetchObjectStatus"


def encode(statuses: Iterable[ObjectStatus]) -> bytes:
    """The answer."""
    return json.dumps([asdict(status) for status in statuses]).encode()


def decode(answer: bytes) -> list[ObjectStatus]:
    """The other way round, for who asks."""
    return [_status(**each) for each in json.loads(answer)]


def _status(conditions: Any, parents: Any, **rest: Any) -> ObjectStatus:
    parts = (
        ParentStatus(Reference(**each["parent"]), _conditions(each["conditions"]))
        for each in parents
    )
    return ObjectStatus(**rest, conditions=_conditions(conditions), parents=tuple(parts))


def _conditions(found: Any) -> tuple[Condition, ...]:
    return tuple(Condition(**each) for each in found)


def complaints(statuses: Iterable[ObjectStatus]) -> Iterator[tuple[str, Condition]]:
    """Every condition that is not as it should be, and whose it is."""
    for status in statuses:
        for (whose, _), condition in flat(status):
            if not is_good(condition):
                yield whose, condition


def as_json(status: ObjectStatus) -> dict[str, object]:
    """An object's status as Kubernetes writes it."""
    return {
        "apiVersion": status.api_version,
        "kind": status.kind,
        "namespace": status.namespace,
        "name": status.name,
        "conditions": [_as_json(condition) for condition in status.conditions],
        "parents": [
            {
                "parentRef": {k: v for k, v in asdict(each.parent).items() if v is not None},
                "conditions": [_as_json(condition) for condition in each.conditions],
            }
            for each in status.parents
        ],
    }


def _as_json(condition: Condition) -> dict[str, str]:
    return {**asdict(condition), "status": str(condition.status)}
