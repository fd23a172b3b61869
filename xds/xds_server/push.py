"""What became of a change: who was sent it, who answered, how long it took."""

import json
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime


@dataclass(eq=False)
class Push:
    """A change on its way to all sidecars that were connected when it came.

    Times are seconds since the epoch; `changed_at` is when the manifests changed.
    """

    reason: str
    changed_at: float
    #: Resources that differ for any of the sidecars, such as `route outbound|80|web.demo`.
    changed: tuple[str, ...]
    waiting: set[Hashable]
    #: The nonces that each client was sent as part of this change.
    reached: dict[Hashable, set[str]] = field(default_factory=dict)
    nacks: list[str] = field(default_factory=list)
    last_answer: float | None = None

    def sent(self, client: Hashable, nonce: str) -> None:
        """The client was sent a part of this change."""
        if client in self.waiting:
            self.reached.setdefault(client, set()).add(nonce)

    def answered(self, client: Hashable, nonce: str, at: float, nack: str | None = None) -> None:
        """The client answered; `nack` says what it refused and why. Answers to what was sent
        before this change do not count."""
        if client in self.waiting and nonce in self.reached.get(client, ()):
            self.last_answer = at
            if nack is not None:
                self.nacks.append(nack)

    def summary(self) -> str:
        """One line for people."""
        what = (
            f"pushed {count(len(self.changed), 'change')} to {count(len(self.reached), 'sidecar')}"
        )
        parts = [what if self.reached else f"{count(len(self.changed), 'change')} to push"]
        if self.last_answer is not None:
            answer = "answer" if self.nacks else "ACK"
            parts.append(f"last {answer} after {self._milliseconds():.1f} ms")
        if self.nacks:
            parts.append(count(len(self.nacks), "NACK"))
        if self.waiting:
            parts.append(f"no answer yet from {listed(str(client) for client in self.waiting)}")
        return f"{', '.join(parts)} ({self.reason})"

    def event(self) -> str:
        """One JSON line for programs; `last_ack_ms` is null when nobody answered."""
        time = datetime.fromtimestamp(self.changed_at, UTC).isoformat(timespec="milliseconds")
        answered = self.last_answer is not None
        return json.dumps(
            {
                "time": time,
                "reason": self.reason,
                "changed": list(self.changed),
                "sidecars": len(self.reached),
                "last_ack_ms": round(self._milliseconds(), 3) if answered else None,
                "nacks": self.nacks,
                "waiting": sorted(str(client) for client in self.waiting),
            }
        )

    def _milliseconds(self) -> float:
        return ((self.last_answer or self.changed_at) - self.changed_at) * 1000


def count(number: int, noun: str) -> str:
    """`1 sidecar`, `3 sidecars`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    ordered = sorted(names)
    more = [f"{len(ordered) - most} more"] if len(ordered) > most else []
    return ", ".join([*ordered[:most], *more])
