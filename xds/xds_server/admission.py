"""Who is let in: bounds on how many clients there are and how fast they come. No I/O."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from redirector.errors import RedirectorError

log = logging.getLogger(__name__)

#: Refusals of one kind are told once in so many seconds: a hostile client must not fill the disk.
_TELL_EVERY_S = 1.0


class Reason(StrEnum):
    """Why a client is refused; the metrics' label."""

    MAX_CLIENTS = "max-clients"
    CONNECT_RATE = "connect-rate"
    NO_REQUEST = "no-request"
    MALFORMED = "malformed"
    NODE_ID = "node-id"
    IDENTITY = "identity"
    NAMES = "names"
    DRAINING = "draining"


class Refused(RedirectorError):  # noqa: N818 - reads as the state it reports
    """The client is not served; the text is for it and for the log."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """What one server bears, and one client may ask of it.

    `clients` at a time, those that have not said who they are included; `connects` a second, twice
    as many at once; a first request within `first_request_s`; streams end at `stream_age_s`, up to
    a fifth earlier by chance, so that clients that came together do not return together.
    """

    clients: int = 10_000
    connects: float = 500.0
    first_request_s: float = 10.0
    stream_age_s: float = 1800.0
    #: How long beyond a connection's last stream's age a client may go on not reading.
    stuck_s: float = 60.0
    #: Of all types together, beyond four times those that there are for the client: it keeps each,
    #: and names it in a request with the version that it has.
    names: int = 10_000
    name_length: int = 1024
    types: int = 32
    unanswered: int = 100
    #: Requests a second, ten times as many at once; beyond that they are read later. A hundred
    #: names count as one more.
    requests: float = 200.0


class TokenBucket:
    """`rate` a second, `burst` at once."""

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = burst
        self._at = clock()

    def take(self) -> bool:
        """Take one if there is one."""
        self._fill()
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def owe(self, number: float = 1) -> float:
        """Take so many in any case; how long to wait until they are paid for, in seconds."""
        self._fill()
        self._tokens -= number
        return max(0.0, -self._tokens / self._rate)

    def _fill(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now


@dataclass
class Admission:
    """Counts who is in, and who was refused and why."""

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    draining: bool = False
    clients: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._bucket = TokenBucket(self.limits.connects, 2 * self.limits.connects, self.clock)
        self._told: dict[Reason, float] = {}
        self._untold: Counter[Reason] = Counter()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A client's place for as long as it is there. Refused when there is none."""
        if self.draining:
            raise Refused(Reason.DRAINING, "the server is about to stop; connect again")
        if self.clients >= self.limits.clients:
            raise Refused(
                Reason.MAX_CLIENTS,
                f"{self.clients} clients are connected already; raise --max-clients or add servers",
            )
        if not self._bucket.take():
            raise Refused(
                Reason.CONNECT_RATE,
                f"more than {self.limits.connects:g} clients a second (--connect-rate); try again",
            )
        self.clients += 1
        try:
            yield
        finally:
            self.clients -= 1

    def note(self, refused: Refused) -> None:
        """Count a refusal, and say so unless that was said a moment ago."""
        reason, now = refused.reason, self.clock()
        self.refused[reason] += 1
        if now - self._told.get(reason, -_TELL_EVERY_S) < _TELL_EVERY_S:
            self._untold[reason] += 1
            return
        untold = self._untold.pop(reason, 0)
        more = f" (and {untold} more since the last such line)" if untold else ""
        self._told[reason] = now
        log.warning("refused a client: %s%s", refused, more)
