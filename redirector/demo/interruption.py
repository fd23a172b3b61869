"""Being told to end: Ctrl-C, SIGTERM and SIGHUP alike, because what was made has to go."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Raises KeyboardInterrupt in the process that made it, and remembers that it was told.

    The exception may come anywhere, also where a library swallows all exceptions: `check` asks
    again.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._told = False
        self._held_off = False

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """What signal.signal() is given."""
        if os.getpid() != self._owner:
            # A forked helper, of pyroute2 or of the lab: it must not take our things down.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._told = True
        self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt when told to end, unless held off."""
        if self._told and not self._held_off:
            raise KeyboardInterrupt

    def remember(self) -> None:
        """Note a KeyboardInterrupt that another handler has raised meanwhile."""
        self._told = True

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Nothing interrupts the block; `check` after it tells of what came meanwhile."""
        self._held_off = True
        try:
            yield
        finally:
            self._held_off = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Handle the signals until the block is left; only the main thread is ever told."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption.handle) for number in _SIGNALS}
    try:
        yield interruption
    finally:
        for number, old in before.items():
            signal.signal(number, old)
