"""Parts of objects as the API server sends them. Pure."""

from collections.abc import Mapping
from typing import Any


def mapping(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part that is an object itself, empty if it is missing; ValueError for anything else."""
    found = value.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{name}: {found!r:.60} is not an object")
    return found
