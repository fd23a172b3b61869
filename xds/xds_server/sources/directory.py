"""The manifests in a directory as a source."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from xds_server.errors import Problem
from xds_server.sources.files import Manifests
from xds_server.sources.objects import KubeObject
from xds_server.sources.source import Change
from xds_server.watch import changes, listing


class Directory:
    """A directory, read anew each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._manifests = Manifests(path)
        self._seen = listing(path)

    def __str__(self) -> str:
        return str(self._path)

    async def read(self) -> tuple[list[KubeObject], list[Problem]]:
        """As `Manifests.load`, without holding up the event loop."""
        return await asyncio.to_thread(self._manifests.load)

    def changes(self) -> AsyncGenerator[Change, None]:
        """From when this was made on."""
        return changes(self._path, self._seen)
