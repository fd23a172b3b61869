"""What the end-to-end tests run in: pods made by hand, and a folder that sidecars can read."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import open_folder
from running import DEMO, Sidecar, XdsServer

from redirector.lab import Node


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that uid 1337 may enter, which pytest's own tmp_path is not."""
    with open_folder() as path:
        yield path


@pytest.fixture
def manifests(place: Path) -> Path:
    """A copy of the demo's manifests to edit."""
    return Path(shutil.copytree(DEMO, place / "manifests"))


@pytest.fixture
def serve(place: Path, manifests: Path) -> Iterator[Callable[[], XdsServer]]:
    """Starts `xds-server` on the manifests; stopped after the test."""
    running: list[XdsServer] = []

    def start() -> XdsServer:
        running.append(XdsServer(place, manifests))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def sidecar(node: Node, place: Path) -> Callable[[str, str, str], Sidecar]:
    """Starts an Envoy in a pod of its own: name of the demo's pod, its IP, the xDS address."""

    def start(name: str, ip: str, xds: str) -> Sidecar:
        return Sidecar(node.pod(name, ip), place, name, "demo", xds)

    return start
