"""From a source to the sidecars: read, ingest, publish; again when something changed."""

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from redirector.errors import RedirectorError
from xds_server.ahead import policies_ahead
from xds_server.errors import Problem
from xds_server.garbage import postponed
from xds_server.ingest import Ingester
from xds_server.ingest.scopes import NOTHING, Wishes
from xds_server.ir import Mesh
from xds_server.lineage import Lineage
from xds_server.server import Server
from xds_server.sources.source import Change, Source
from xds_server.telling import Telling

log = logging.getLogger("xds_server")

#: So long a new Service waits for the sidecars behind it to take their policies.
_AHEAD_S = 2.0


@dataclass(frozen=True)
class Read:
    """The mesh of a source, how many objects it was read from, and every problem."""

    mesh: Mesh
    objects: int
    problems: list[Problem]

    def lines(self) -> Iterator[tuple[str, int]]:
        """What there is to say of it, and how loudly."""
        mesh = self.mesh
        yield from ((str(problem), logging.ERROR) for problem in self.problems)
        for subjects, outcome in (
            (mesh.kept, "stays as it last was good"),
            (mesh.left_out, "left out until it is good"),
            (mesh.closed, "cannot be read, so everything it may be for is refused"),
        ):
            yield from ((f"{subject}: {outcome}", logging.WARNING) for subject in subjects)
        yield from ((f"ignored: {subject}", logging.INFO) for subject in mesh.ignored)


class Reader:
    """Reads a source again and again; what is bad now stays as it last was good."""

    def __init__(self, source: Source, defaults: Wishes = NOTHING) -> None:
        self.source = source
        self._ingester = Ingester(defaults)
        self._said: Collection[str] = ()
        #: As it was read last.
        self.mesh: Mesh | None = None

    async def read(self) -> Read:
        """What there is now; with the mesh from before if that is nothing at all."""
        objects, problems = await self.source.read()
        if not objects and not problems and self.mesh is not None:
            # The last good forms are kept for when it is back.
            return Read(self.mesh, 0, [])
        suspects = frozenset().union(*(problem.suspects for problem in problems))
        with nullcontext() if self.mesh else postponed():
            mesh, more = await asyncio.to_thread(self._ingester.ingest, objects, suspects)
        self.mesh = mesh
        return Read(mesh, len(objects), [*problems, *more])

    def note(self, found: Read) -> None:
        """Say what is wrong and what became of it, as far as it is news."""
        lines = dict(found.lines())
        for line, level in lines.items():
            if line not in self._said:
                log.log(level, "%s", line)
        self._said = lines.keys()


def count_in(found: Read, server: Server) -> None:
    """For the metrics: what was read last."""
    server.tally.objects, server.tally.problems = found.objects, len(found.problems)


async def follow(reader: Reader, lineage: Lineage, server: Server, telling: Telling) -> None:
    """Publish what changes; when that fails, the last state that could be published stays."""
    async for change in reader.source.changes():
        try:
            await _reload(reader, change, lineage, server, telling)
        except RedirectorError as error:
            log.error("%s", error)
            log.error("still serving the last good state (%s)", change.reason)
        except Exception:
            log.exception("still serving the last good state (%s)", change.reason)


async def _reload(
    reader: Reader, change: Change, lineage: Lineage, server: Server, telling: Telling
) -> None:
    before = reader.mesh
    found = await reader.read()
    if not found.objects and not found.problems:
        # More likely a writer between two steps than a wish to drop every policy.
        log.error(
            "no object in %s, still serving the last good state; restart to serve none",
            reader.source,
        )
        return
    reader.note(found)
    count_in(found, server)
    # A client that is somebody else's by now gets nothing of what is new.
    server.know(found.mesh.workloads)
    first = policies_ahead(before, found.mesh) if before else None
    if first is not None:
        reason = f"{change.reason}, policies of its new Services first"
        await server.publish(lineage.next(first), reason, change.at, wait=_AHEAD_S)
    await server.publish(lineage.next(found.mesh), change.reason, change.at)
    telling.tell(found.mesh)
