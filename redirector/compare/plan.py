"""In which order things are measured, and how long each. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from redirector.compare.cases import Case, Rung, why_not

#: One round has no spread.
MIN_ROUNDS = 2


@dataclass(frozen=True)
class Plan:
    """Times in seconds. A `budget` shortens the measurements so that all rounds fit into it."""

    cases: tuple[Case, ...]
    rungs: tuple[Rung, ...]
    rounds: int
    warmup: float
    seconds: float
    budget: float | None = None

    def cells(self) -> int:
        """How many measurements there are in all."""
        return self.rounds * sum(why_not(c, r) is None for c in self.cases for r in self.rungs)

    def order(self) -> Iterator[tuple[int, Case, Rung]]:
        """Every measurement: rungs next to each other in time, starting with another each round.

        So that a machine that slows down for a while does not single out one rung.
        """
        for number in range(1, self.rounds + 1):
            for case in self.cases:
                for rung in rotated(self.rungs, number - 1):
                    if why_not(case, rung) is None:
                        yield number, case, rung

    def is_over(self, elapsed: float, number: int) -> bool:
        """Whether the budget is spent in round `number`; two rounds are measured in any case."""
        return self.budget is not None and elapsed > self.budget and number > MIN_ROUNDS

    def seconds_now(self, elapsed: float, done: int) -> float:
        """How long to measure next, `done` measurements having taken `elapsed` seconds.

        The overhead of starting a load is taken from what it has been so far.
        """
        if self.budget is None or done == 0:
            return self.seconds
        left = (self.budget - elapsed) / max(self.cells() - done, 1)
        overhead = 0.12
        return min(max(left - overhead - self.warmup, 0.05), self.seconds)


def rotated(items: Sequence[Rung], by: int) -> tuple[Rung, ...]:
    """`items` beginning with the one at `by`, wrapping around."""
    by %= len(items)
    return (*items[by:], *items[:by])
