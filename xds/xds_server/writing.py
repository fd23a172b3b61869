"""Writes the objects' statuses to the API server, whenever they differ from what stands there.

Every replica of the server writes, for all come to the same conditions. A write names the version
that it was made for, so of two at once the second is refused, and its writer finds nothing left to
do. What only one replica knows (what its sidecars refuse) it marks with its name.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from redirector.apiserver.client import ApiError
from redirector.apiserver.reflector import Backoff
from xds_server.admission import TokenBucket
from xds_server.blame import refusals
from xds_server.conditions import ObjectStatus
from xds_server.ir import Mesh, Name, NodeId
from xds_server.quarantine import Quarantined
from xds_server.sources.kubernetes import Kubernetes
from xds_server.sources.resources import KINDS, ApiObject, Kind
from xds_server.statuses import Refusal, Replica, patch, with_programmed

log = logging.getLogger("xds_server")

#: Writes a second, and at once.
_RATE, _BURST = 10.0, 50.0
#: Replicas that learn of the same change do not all write in the same moment.
_JITTER_S = 0.3
#: How often is looked for what sidecars refuse.
_LOOK_S = 2.0
#: How often everything is looked at again: a replica that told of its sidecars may be gone.
_RESYNC_S = 60.0
_AFTER_ERROR_S = 5.0
_CONFLICT, _NOT_FOUND = 409, 404

Key = tuple[str, Name]
#: What sidecars refuse now, and whose they are.
Refused = Callable[[], Iterable[tuple[NodeId, Quarantined]]]


class Writer:
    """Made for one source; `run` writes until it is cancelled."""

    def __init__(self, source: Kubernetes, refused: Refused, replica: str) -> None:
        self._source = source
        self._refused = refused
        self._replica = Replica(replica, source.runs)
        self._mesh = Mesh()
        self._news = asyncio.Event()
        self._pace = TokenBucket(_RATE, _BURST)
        self._backoff = Backoff()
        self._refusals: dict[Key, list[Refusal]] = {}
        #: What was looked at and needs nothing, or was written: it stands so until one of both is
        #: another value.
        self._done: dict[Key, tuple[ApiObject, ObjectStatus | None]] = {}
        self._said = ""
        source.on_status(self._news.set)

    def want(self, mesh: Mesh) -> None:
        """Write the statuses of this mesh from now on."""
        self._mesh = mesh
        self._refusals = self._blame()
        self._news.set()

    async def run(self) -> None:
        """Write what differs, again and again."""
        resync = time.monotonic() + _RESYNC_S
        while True:
            # Not wait_for, which before Python 3.12 may swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._news.wait()
            refused = self._blame()
            if refused != self._refusals:
                self._refusals = refused
                self._news.set()
            if time.monotonic() >= resync:
                resync = time.monotonic() + _RESYNC_S
                self._done.clear()
                self._news.set()
            if self._news.is_set():
                await asyncio.sleep(random.uniform(0, _JITTER_S))
                self._news.clear()
                try:
                    await self._pass()
                except Exception:
                    # Sidecars are served without statuses, too.
                    log.exception("statuses are not written")
                    await asyncio.sleep(_AFTER_ERROR_S)

    def _blame(self) -> dict[Key, list[Refusal]]:
        return refusals(self._mesh, self._refused())

    async def _pass(self) -> None:
        wanted: dict[Key, ObjectStatus] = {}
        for status in self._mesh.statuses:
            key = (status.kind, Name(status.namespace, status.name))
            wanted[key] = with_programmed(status, self._refusals.get(key, ()), self._replica.name)
        done: dict[Key, tuple[ApiObject, ObjectStatus | None]] = {}
        for kind in KINDS:
            for item in self._source.table(kind).values() if kind.told else ():
                key = (kind.kind, item.name)
                want = wanted.get(key)
                before = self._done.get(key)
                settled = before is not None and before[0] is item and before[1] == want
                if settled or await self._settle(kind, item, want):
                    done[key] = (item, want)
        self._done = done

    async def _settle(self, kind: Kind, item: ApiObject, want: ObjectStatus | None) -> bool:
        """Whether nothing is left to be done for these two values."""
        if want is not None and want.generation != item.generation:
            return False  # it was changed since it was read; there will be another look
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        changes = patch(item.status or {}, want, now, self._replica)
        if not changes:
            return True
        if wait := self._pace.owe():
            await asyncio.sleep(wait)
        try:
            await self._source.write_status(kind, item, changes)
        except ApiError as error:
            if error.status in (_CONFLICT, _NOT_FOUND):
                return True  # what stands there now is on its way to us
            if str(error) != self._said:
                log.warning("a status is not written: %s", error)
            self._said = str(error)
            await asyncio.sleep(max(error.retry_after, self._backoff.next()))
            self._news.set()
            return False
        self._said = ""
        self._backoff.reset()
        return True
