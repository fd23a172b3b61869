"""What all connections share: the state that is served, and the books on each change of it."""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from xds_server.garbage import give_back
from xds_server.generation import Generation
from xds_server.ir import NodeId
from xds_server.push import Push
from xds_server.references import kind
from xds_server.room import Room
from xds_server.snapshot import Snapshot
from xds_server.tally import Tally

log = logging.getLogger(__name__)

#: How long a change waits for answers before it is reported without them.
REPORT_AFTER_S = 5.0


class Client(Protocol):
    """What the hub knows of a connection: whose it is, and how to tell it that there is news."""

    def __hash__(self) -> int: ...

    @property
    def node(self) -> NodeId: ...

    def stays(self, old: Generation, new: Generation) -> bool: ...

    def offer(self, generation: Generation, snapshot: Snapshot | None) -> None: ...


class Hub:
    """Holds one generation at a time, for every sidecar that is connected.

    `report` is given each push when all clients have answered, or after `report_after` seconds.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        report: Callable[[Push], None],
        report_after: float = REPORT_AFTER_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.generation = generation
        self.connections: set[Client] = set()
        self.clock = clock
        self._report = report
        self._report_after = report_after
        self.tally = Tally()
        self.room = Room(quiet=give_back)
        self._encoded_before = 0
        self._pushes: dict[Push, asyncio.TimerHandle] = {}
        self._waiters: dict[Push, asyncio.Future[None]] = {}
        # One thread: snapshots share an encoder, and the event loop stays free meanwhile.
        self._translator = ThreadPoolExecutor(1, "translate")

    @property
    def encodings(self) -> int:
        """How many resources were serialized so far, for all sidecars and states together."""
        return self._encoded_before + self.generation.encodings

    async def publish(self, generation: Generation, reason: str, changed_at: float) -> Push:
        """Bring every client to this generation.

        All their snapshots are made first: an error is raised before any client sees a change.
        """
        nodes = {connection.node for connection in self.connections}
        await self._in_translator(generation.prepare, nodes)
        old, self.generation = self.generation, generation
        self._encoded_before += old.encodings
        different: dict[tuple[int, int], tuple[Snapshot | None, Snapshot | None]] = {}
        concerned: set[Hashable] = set()
        for client in self.connections:
            before, now = old.ready(client.node), generation.ready(client.node)
            # Whoever the change does not concern has nothing to do and nothing to answer.
            if before is now and client.stays(old, generation):
                continue
            concerned.add(client)
            different[id(before), id(now)] = (before, now)
            client.offer(generation, now)
        changed = set().union(*(_changed(before, now) for before, now in different.values()))
        push = Push(reason, changed_at, tuple(sorted(changed)), concerned)
        self._pushes[push] = asyncio.get_running_loop().call_later(
            self._report_after, self._finish, push
        )
        self.settle(None)
        return push

    async def ended(self, push: Push, within: float) -> None:
        """Until every client that the push concerns has answered, or `within` s."""
        if push in self._pushes:
            waiter = self._waiters[push] = asyncio.get_running_loop().create_future()
            await asyncio.wait([waiter], timeout=within)
            self._waiters.pop(push, None)

    async def snapshot(self, generation: Generation, node: NodeId) -> Snapshot:
        """The node's snapshot; made in the translator's thread if it is not there yet."""
        snapshot = generation.ready(node)
        if snapshot is None:
            snapshot = await self._in_translator(generation.snapshot, node)
        assert snapshot is not None
        return snapshot

    def sent(self, client: Client, nonce: str) -> None:
        """Book a response on the pushes that it is a part of."""
        for push in self._pushes:
            push.sent(client, nonce)

    def answered(self, client: Client, nonce: str, at: float, nack: str | None) -> None:
        """Book the answer to a response; `nack` says what was refused and why."""
        for push in self._pushes:
            push.answered(client, nonce, at, nack)

    def settle(self, client: Client | None) -> None:
        """Close the books on pushes that this client, now up to date, was the last to answer."""
        for push in list(self._pushes):
            push.waiting.discard(client)
            if not push.waiting:
                self._finish(push)

    def close(self) -> None:
        """Report what is left to report."""
        for push in list(self._pushes):
            self._finish(push)
        self._translator.shutdown()

    def _finish(self, push: Push) -> None:
        self._pushes.pop(push).cancel()
        if waiter := self._waiters.pop(push, None):
            waiter.set_result(None)
        if push.last_answer is not None:
            self.tally.push_seconds.add(push.last_answer - push.changed_at)
        if push.waiting:
            self.tally.unanswered_pushes += 1
        log.info("%s", push.summary())
        self._report(push)

    async def _in_translator(self, function: Callable[..., Any], *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._translator, function, *args)


def _changed(old: Snapshot | None, new: Snapshot | None) -> set[str]:
    """Names of the resources that differ, with their kinds."""
    if old is None or new is None:
        return set()
    return {
        f"{kind(type_url)} {name}"
        for type_url in {*old.types, *new.types}
        for name in new.of(type_url).changed_since(old.of(type_url))
    }
