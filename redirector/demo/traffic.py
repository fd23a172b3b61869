"""A client that keeps sending, as seen from the demo."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from redirector.demo.client import Kind, Outcome
from redirector.errors import RedirectorError

#: How long the client may need for the requests that the demo waits for, seconds.
_PATIENCE = 60.0


@dataclass(frozen=True)
class Tally:
    """Some requests, counted."""

    outcomes: Sequence[Outcome]

    @property
    def failures(self) -> list[Outcome]:
        """Those that the application did not answer."""
        return [outcome for outcome in self.outcomes if outcome.failed]

    def split(self) -> dict[str, int]:
        """How many requests each application answered, by name."""
        names = Counter(outcome.name for outcome in self.outcomes if not outcome.failed)
        return dict(sorted(names.items()))

    @property
    def kept(self) -> int:
        """How many were sent on kept connections."""
        return sum(outcome.kind is Kind.KEPT for outcome in self.outcomes)

    def kept_open(self) -> int:
        """How many connections were kept from their first request here to their last."""
        workers = {outcome.worker for outcome in self.outcomes if outcome.kind is Kind.KEPT}
        return len(workers - {outcome.worker for outcome in self.failures})

    def why(self) -> str:
        """What went wrong, by cause; empty when nothing did."""
        causes = Counter(o.error or f"status {o.status}" for o in self.failures)
        return ", ".join(f"{number} x {cause}" for cause, number in causes.most_common(3))


class Traffic:
    """Reads the outcomes as they are written."""

    def __init__(self, log: Path, stop: Callable[[], None]) -> None:
        self._log = log
        self._stop: Callable[[], None] | None = stop
        self._position = 0
        self._outcomes: list[Outcome] = []

    def now(self) -> int:
        """How many requests have been answered or have failed so far."""
        with self._log.open("rb") as log:
            log.seek(self._position)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                fields = json.loads(line)
                self._outcomes.append(Outcome(**{**fields, "kind": Kind(fields["kind"])}))
        return len(self._outcomes)

    def sent_since(self, moment: float) -> Tally:
        """The finished ones that were sent at `moment` (CLOCK_MONOTONIC) or later."""
        self.now()
        return Tally([outcome for outcome in self._outcomes if outcome.at >= moment])

    def wait_for(self, number: int, since: float | None = None) -> Tally:
        """`number` more requests, sent from `since` on, or from now on."""
        moment = time.monotonic() if since is None else since
        deadline = time.monotonic() + _PATIENCE
        while len((tally := self.sent_since(moment)).outcomes) < number:
            if time.monotonic() > deadline:
                raise RedirectorError(
                    f"the client sent {len(tally.outcomes)} of {number} requests in "
                    f"{_PATIENCE:.0f} s"
                )
            time.sleep(0.02)
        return tally

    def all(self) -> Tally:
        """Every request so far."""
        return self.sent_since(0.0)

    def stop(self) -> None:
        """End the client, each worker after the request it is at; a second call does nothing."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()
