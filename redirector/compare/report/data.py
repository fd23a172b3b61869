"""What every form of the report is made from."""

from dataclasses import dataclass
from functools import cached_property

from redirector.compare.cases import Case, Rung, why_not
from redirector.compare.host import Host
from redirector.compare.statistics import Metric, Ratio, Result, losses, medians


@dataclass(frozen=True)
class Report:
    """A whole run. `results` in the order measured."""

    host: Host
    rounds: int
    cases: tuple[Case, ...]
    rungs: tuple[Rung, ...]
    results: tuple[Result, ...]
    ratios: tuple[Ratio, ...]

    @cached_property
    def medians(self) -> dict[tuple[str, Rung], Result]:
        """The median of each case and rung that was measured."""
        found = {
            (case.name, rung): medians(self.results, case.name, rung)
            for case in self.cases
            for rung in self.rungs
        }
        return {key: value for key, value in found.items() if value is not None}

    @cached_property
    def losses(self) -> tuple[Ratio, ...]:
        """Where eBPF loses."""
        return tuple(losses(self.ratios))

    @cached_property
    def _by_key(self) -> dict[tuple[str, Rung, Rung, Metric], Ratio]:
        return {(r.case, r.rung, r.versus, r.metric): r for r in self.ratios}

    def ratio(self, case: Case, rung: Rung, versus: Rung, metric: Metric) -> Ratio | None:
        """Return one ratio, None where there is none."""
        return self._by_key.get((case.name, rung, versus, metric))

    def absent(self) -> list[tuple[Case, Rung, str]]:
        """What a rung cannot carry, and why."""
        return [
            (case, rung, reason)
            for case in self.cases
            for rung in self.rungs
            if (reason := why_not(case, rung)) is not None
        ]


def loss_text(ratio: Ratio) -> str:
    """A loss as a sentence: what, against what, by how much, with its spread."""
    spread = f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
    what = {
        Metric.P50: f"takes {spread} the time (p50) of",
        Metric.OPS: f"does {spread} the operations a second of",
        Metric.CPU: f"costs {spread} the CPU time an operation of",
    }[ratio.metric]
    return f"{ratio.case}: {ratio.rung} {what} {ratio.versus}"
