"""How many bytes are on their way to clients at a time: a thousand that come at once and are sent
megabytes each would otherwise take gigabytes."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

ROOM_BYTES = 16 << 20
#: Less than this is not worth to wait for.
SMALL_BYTES = 64 << 10
#: Whoever takes longer to read a message does so at its own expense: others go on.
PATIENCE_S = 1.0
#: How long nothing large is on its way until that is told.
QUIET_S = 1.0


class Room:
    """Large messages wait for their turn until there is room for them; small ones pass by. `quiet`
    is called once all of them are through and no other one has come for QUIET_S."""

    def __init__(
        self,
        room: int = ROOM_BYTES,
        small: int = SMALL_BYTES,
        patience: float = PATIENCE_S,
        quiet: Callable[[], None] = lambda: None,
    ) -> None:
        self._room = room
        self._small = small
        self._patience = patience
        self._taken = 0
        self._quiet = quiet
        self._calm: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def passes(self, size: int) -> bool:
        """Whether a message of so many bytes needs no room."""
        return size <= self._small

    @asynccontextmanager
    async def for_(self, size: int) -> AsyncIterator[None]:
        """Holds room for a message of so many bytes while it is sent, or until patience ends."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append((size, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(size)
            raise
        given_back = False

        def give_back() -> None:
            nonlocal given_back
            if not given_back:
                given_back = True
                self._give_back(size)

        timer = loop.call_later(self._patience, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()

    def _give_back(self, size: int) -> None:
        self._taken -= size
        self._admit()
        if self._calm is not None:
            self._calm.cancel()
        if not self._taken:
            self._calm = asyncio.get_running_loop().call_later(QUIET_S, self._tell)

    def _tell(self) -> None:
        if not (self._taken or self._waiting):
            self._quiet()

    def _admit(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            # What is larger than all the room goes alone.
            if not turn.cancelled() and self._taken and self._taken + size > self._room:
                return
            self._waiting.popleft()
            if not turn.cancelled():
                self._taken += size
                turn.set_result(None)
