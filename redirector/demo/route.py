"""The weights in the demo's HTTPRoute, in its file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from redirector.errors import InputError

FILE = "route-web.yaml"


def weights(path: Path) -> dict[str, int]:
    """The weight of each service that has one."""
    return {backend["name"]: backend["weight"] for backend in _weighted(_read(path))}


def reweigh(path: Path, new: Mapping[str, int]) -> None:
    """Give each of these services its weight. InputError when one has none to change."""
    route = _read(path)
    backends = {backend["name"]: backend for backend in _weighted(route)}
    for name, weight in new.items():
        if name not in backends:
            raise InputError(f"{path}: no backendRef {name} with a weight; give it one")
        backends[name]["weight"] = weight
    # As an editor saves: a reader sees the old file or the new one.
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(yaml.safe_dump(route, sort_keys=False))
    staging.rename(path)


def _read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def _weighted(route: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for rule in route["spec"]["rules"]:
        yield from (backend for backend in rule["backendRefs"] if "weight" in backend)
