"""What every form of the report is made from."""

from dataclasses import dataclass
from functools import cached_property

from redirector.compare.cases import Case, Metric, Rung, why_not
from redirector.compare.host import Host
from redirector.compare.statistics import Ratio, Result, losses, medians

METRIC_TEXT = {
    Metric.P50: "time (p50)",
    Metric.P99: "time (p99)",
    Metric.OPS: "operations a second",
    Metric.CPU: "CPU time an operation",
}


@dataclass(frozen=True)
class Loss:
    """One rung losing against another in one case, in one metric or more."""

    case: str
    rung: Rung
    versus: Rung
    ratios: tuple[Ratio, ...]

    def ratio(self, metric: Metric) -> Ratio | None:
        """Return the ratio in `metric`, None where it does not lose in that."""
        return next((ratio for ratio in self.ratios if ratio.metric is metric), None)


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
    def losses(self) -> tuple[Loss, ...]:
        """Where eBPF loses, the metrics of a pair together."""
        grouped: dict[tuple[str, Rung, Rung], list[Ratio]] = {}
        for ratio in losses(self.ratios):
            grouped.setdefault((ratio.case, ratio.rung, ratio.versus), []).append(ratio)
        return tuple(Loss(*key, tuple(found)) for key, found in grouped.items())

    @cached_property
    def baselines(self) -> tuple[Rung, ...]:
        """The rungs that others are compared with in this run."""
        return tuple(dict.fromkeys(ratio.versus for ratio in self.ratios))

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
