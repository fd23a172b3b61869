"""From a source to the sidecars: read, ingest, publish; again when something changed."""

import asyncio
import logging

from redirector.errors import RedirectorError
from xds_server.errors import Problem
from xds_server.ingest import ingest
from xds_server.ir import Mesh
from xds_server.lineage import Lineage
from xds_server.push import count
from xds_server.server import Server
from xds_server.sources.source import Change, Source

log = logging.getLogger("xds_server")


async def read(source: Source) -> tuple[Mesh, int, list[Problem]]:
    """The mesh of a source, how many objects it was read from, and every problem."""
    objects, problems = await source.read()
    mesh, more = await asyncio.to_thread(ingest, objects)
    return mesh, len(objects), [*problems, *more]


def note_ignored(mesh: Mesh) -> None:
    """Say what in it has no effect."""
    for name in mesh.ignored:
        log.debug("ignored: %s", name)


async def follow(source: Source, lineage: Lineage, server: Server) -> None:
    """Publish what changes; whatever is wrong with it, the last good state stays."""
    async for change in source.changes():
        try:
            await _reload(source, change, lineage, server)
        except RedirectorError as error:
            log.error("%s", error)
            log.error("still serving the last good state (%s)", change.reason)
        except Exception:
            log.exception("still serving the last good state (%s)", change.reason)


async def _reload(source: Source, change: Change, lineage: Lineage, server: Server) -> None:
    mesh, objects, problems = await read(source)
    if not objects and not problems:
        # More likely a writer between two steps than a wish to drop every policy.
        log.error(
            "no object in %s, still serving the last good state; restart to serve none", source
        )
        return
    if problems:
        for problem in problems:
            log.error("%s", problem)
        found = count(len(problems), "problem")
        log.error("%s, still serving the last good state (%s)", found, change.reason)
        return
    note_ignored(mesh)
    await server.publish(lineage.next(mesh), change.reason, change.at)
