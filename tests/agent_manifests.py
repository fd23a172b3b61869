"""What manifests/agent gives to a cluster."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).parents[1] / "manifests" / "agent"


def objects() -> Iterator[dict[str, Any]]:
    """Every object, in the files' order."""
    for path in sorted(DIRECTORY.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def one(kind: str) -> dict[str, Any]:
    """The only object of its kind."""
    (found,) = (each for each in objects() if each["kind"] == kind)
    return found


def container() -> dict[str, Any]:
    """The agent's container."""
    (found,) = one("DaemonSet")["spec"]["template"]["spec"]["containers"]
    return found


def allowed() -> set[tuple[str, str]]:
    """(verb, resource) of all that the ClusterRole grants."""
    return {
        (verb, resource)
        for rule in one("ClusterRole")["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }


def capabilities() -> list[str]:
    """The capabilities that the agent keeps."""
    kept = container()["securityContext"]["capabilities"]
    assert kept["drop"] == ["ALL"]
    return list(kept["add"])
