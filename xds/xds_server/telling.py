"""Tells what became of objects: the log, and who writes statuses."""

import logging
from collections.abc import Callable, Iterable

from xds_server.blame import refusals
from xds_server.conditions import ObjectStatus
from xds_server.ir import Mesh, Name, NodeId
from xds_server.quarantine import Quarantined
from xds_server.statuses import lines, with_programmed

Refused = Iterable[tuple[NodeId, Quarantined]]

log = logging.getLogger("xds_server")


class Telling:
    """Tells each change of a condition once; `further` is given every mesh."""

    def __init__(self, further: Callable[[Mesh], None] | None = None) -> None:
        self._further = further
        self._told: tuple[ObjectStatus, ...] = ()
        self._mesh = Mesh()

    def outcomes(self, refused: Refused) -> list[ObjectStatus]:
        """What became of every object with a status, and whether sidecars take what was made of
        it."""
        found = refusals(self._mesh, refused)
        return [
            with_programmed(each, found.get((each.kind, Name(each.namespace, each.name)), ()))
            for each in self._mesh.statuses
        ]

    def tell(self, mesh: Mesh) -> None:
        """This mesh is served now."""
        for good, line in lines(self._told, mesh.statuses):
            log.log(logging.INFO if good else logging.WARNING, "%s", line)
        self._told, self._mesh = mesh.statuses, mesh
        if self._further is not None:
            self._further(mesh)
