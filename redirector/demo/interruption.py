"""Being told to end: Ctrl-C, SIGTERM and SIGHUP alike, because what was made has to go."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: How long the exception may take to the top before it is raised once more.
_AGAIN_SECONDS = 2.0


class Interruption:
    """Raises KeyboardInterrupt in the process that made it, and remembers that it was told.

    The exception may come anywhere, also where a library swallows all exceptions: a timer raises
    it again until somebody says that it has arrived, and `check` asks.
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
        if not self._held_off:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt when told to end, unless held off."""
        if self._told and not self._held_off:
            raise KeyboardInterrupt

    def remember(self) -> None:
        """Note a KeyboardInterrupt that has arrived, also one that another handler raised."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._told = True

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Nothing interrupts the block; `check` after it tells of what came meanwhile."""
        self._held_off = True
        signal.setitimer(signal.ITIMER_REAL, 0)
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
    handled = (*_SIGNALS, signal.SIGALRM)
    before = {number: signal.signal(number, interruption.handle) for number in handled}
    try:
        yield interruption
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in before.items():
            signal.signal(number, old)
