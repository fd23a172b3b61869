"""A cluster's API server as a source: a table for each kind, kept by list and watch."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress

from redirector.apiserver.client import ApiError, Client
from redirector.apiserver.reflector import Reflector
from xds_server.errors import Problem
from xds_server.push import listed
from xds_server.sources.objects import KubeObject
from xds_server.sources.resources import KINDS, ApiObject, Kind
from xds_server.sources.source import Change

log = logging.getLogger("xds_server")

#: Changes of these are not kept waiting: traffic goes to what they name.
_URGENT = frozenset({"EndpointSlice"})
#: A burst of other changes is over when nothing came for so long; it is cut after _LONGEST_S.
_QUIET_S = 0.1
_LONGEST_S = 1.0
#: How often is told what is still waited for before anything can be served.
_TELL_EVERY_S = 10.0
#: By its UID clusters are told apart (KEP-2149).
_IDENTITY = "kube-system"

Tables = dict[Kind, Mapping[str, ApiObject]]


class Kubernetes:
    """One API server, followed by a thread for each kind until the process ends.

    Nothing is told before every kind's first list was complete. Whatever the server does wrong,
    what it told last stays.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        #: Kinds whose table changed since it was last looked at, and when the first of them did.
        self._changed: set[Kind] = set()
        self._since = 0.0
        #: The UID of the cluster that is served.
        self._cluster: object = None
        self._said = ""
        self._verifying = threading.Lock()
        self._told: Tables = {}
        #: The same, with the values from before of what differs in its status alone.
        self._tables: Tables = {}
        self._reflectors = {
            kind: Reflector(
                client,
                kind.resource(),
                self._changer(kind),
                self._complain,
                verify=self._verify,
            )
            for kind in KINDS
        }
        self._status_changed: list[Callable[[], None]] = []
        for reflector in self._reflectors.values():
            reflector.start()

    def __str__(self) -> str:
        return f"the cluster at {self._name}"

    def close(self) -> None:
        """Follow no longer; the threads end at their next occasion."""
        for reflector in self._reflectors.values():
            reflector.stop()

    async def read(self) -> tuple[list[KubeObject], list[Problem]]:
        """As `Source.read`; an object that has not changed is the same value again."""
        while lacking := [k.kind for k, r in self._reflectors.items() if r.objects() is None]:
            try:
                async with asyncio.timeout(_TELL_EVERY_S):
                    await self._news.wait()
            except TimeoutError:
                log.info("waiting for %s: no list of %s yet", self, listed(lacking, len(lacking)))
            self._news.clear()
        if not self._tables:
            self._take()
        return [item.source for table in self._tables.values() for item in table.values()], []

    async def changes(self) -> AsyncGenerator[Change, None]:
        """As `Source.changes`: merged in bursts, but for endpoints."""
        while True:
            await self._news.wait()
            await self._burst()
            at = self._since
            reason = self._take()
            if reason:
                yield Change(reason, at)

    def table(self, kind: Kind) -> Mapping[str, ApiObject]:
        """What the server told last of a kind, also what is not yet served; statuses among it."""
        return self._reflectors[kind].objects() or {}

    def on_status(self, call: Callable[[], None]) -> None:
        """Call when an object's status or version changed, in the event loop."""
        self._status_changed.append(call)

    async def write_status(self, kind: Kind, item: ApiObject, status: Mapping[str, object]) -> None:
        """Merge into an object's status, if the object still is as `item` has it.

        ApiError 409 when it is not.
        """
        name = item.name
        body = {"metadata": {"resourceVersion": item.version}, "status": status}
        path = kind.status_path(name.namespace, name.name)
        await asyncio.to_thread(self._client.patch, path, body)

    def runs(self, pod: str) -> bool:
        """Whether the cluster has a pod of this name."""
        return any(
            item.name.name == pod
            for kind in KINDS
            if kind.kind == "Pod"
            for item in self.table(kind).values()
        )

    def problems(self) -> list[str]:
        """Why what is known may be old; [] while the server answers."""
        return [r.problem for r in self._reflectors.values() if r.problem]

    def _changer(self, kind: Kind) -> Callable[[], None]:
        return lambda: self._in_loop(lambda: self._note(kind))

    def _in_loop(self, call: Callable[[], None]) -> None:
        # The threads outlive the loop when the process ends.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def _complain(self, text: str) -> None:
        self._in_loop(lambda: self._say(text))

    def _say(self, text: str) -> None:
        # All kinds may meet the same.
        if text != self._said:
            log.warning("API server: %s", text)
        self._said = text

    def _note(self, kind: Kind) -> None:
        self._said = ""
        if not self._changed:
            self._since = time.time()
        self._changed.add(kind)
        self._news.set()
        if kind.told:
            for call in self._status_changed:
                call()

    async def _burst(self) -> None:
        """Wait until a burst of changes is over, or cannot wait any longer."""
        deadline = self._loop.time() + _LONGEST_S
        while True:
            self._news.clear()
            left = min(_QUIET_S, deadline - self._loop.time())
            if left <= 0 or any(kind.kind in _URGENT for kind in self._changed):
                return
            try:
                async with asyncio.timeout(left):
                    await self._news.wait()
            except TimeoutError:
                return

    def _take(self) -> str:
        """Make what the server told last ours; what changed by it, "" for nothing."""
        told = {kind: self.table(kind) for kind in KINDS}
        self._changed.clear()
        words: dict[str, list[str]] = {"changed": [], "added": [], "removed": []}
        for kind, new in told.items():
            if new is not self._told.get(kind):
                self._tables[kind] = _compare(kind, self._tables.get(kind, {}), new, words)
        self._told = told
        return ", ".join(f"{word} {listed(names)}" for word, names in words.items() if names)

    def _verify(self) -> None:
        """ApiError unless the cluster still is the first one; called in the reflectors' threads."""
        # A list of one: the role grants `list`.
        query = {"fieldSelector": f"metadata.name={_IDENTITY}"}
        found = self._client.get("/api/v1/namespaces", query).get("items") or []
        uid = found[0].get("metadata", {}).get("uid") if found else None
        with self._verifying:
            self._cluster = self._cluster or uid
            if uid not in (None, self._cluster):
                raise ApiError(
                    f"{self} is another one now (namespace {_IDENTITY} has another UID); what the "
                    "first one told stays; restart to follow the new one"
                )


def _compare(
    kind: Kind,
    old: Mapping[str, ApiObject],
    new: Mapping[str, ApiObject],
    words: Mapping[str, list[str]],
) -> dict[str, ApiObject]:
    """The new table, with the old values of what differs in its status alone."""
    table = dict(new)
    for name, item in new.items():
        before = old.get(name)
        if before is None:
            words["added"].append(f"{kind.kind} {name}")
        elif before.source is not item.source:
            if before.data == item.data:
                table[name] = before
            else:
                words["changed"].append(f"{kind.kind} {name}")
    words["removed"].extend(f"{kind.kind} {name}" for name in old.keys() - new.keys())
    return table
