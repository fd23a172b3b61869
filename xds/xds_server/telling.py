"""Tells what became of objects: the log, and who writes statuses."""

import logging
from collections.abc import Callable

from xds_server.conditions import ObjectStatus
from xds_server.ir import Mesh
from xds_server.statuses import lines

log = logging.getLogger("xds_server")


class Telling:
    """Tells each change of a condition once; `further` is given every mesh."""

    def __init__(self, further: Callable[[Mesh], None] | None = None) -> None:
        self._further = further
        self._told: tuple[ObjectStatus, ...] = ()

    def tell(self, mesh: Mesh) -> None:
        """This mesh is served now."""
        for good, line in lines(self._told, mesh.statuses):
            log.log(logging.INFO if good else logging.WARNING, "%s", line)
        self._told = mesh.statuses
        if self._further is not None:
            self._further(mesh)
