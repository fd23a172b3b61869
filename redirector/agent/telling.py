"""What the endpoint answers: the node's metrics with the agent's own, its health."""

import logging
import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from redirector import metrics
from redirector.agent.log import say
from redirector.agent.loop import Agent
from redirector.enrollment import Enrollment
from redirector.errors import RedirectorError
from redirector.serving import Page

#: A loop that has not come round for so many seconds beyond its resync hangs.
_HANGING = 120.0


class Telling:
    """The pages of one agent."""

    def __init__(
        self,
        agent: Agent,
        enrollment: Enrollment,
        api_problems: Callable[[], list[str]],
        resync: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agent = agent
        self._enrollment = enrollment
        self._api_problems = api_problems
        self._resync = resync
        self._clock = clock

    def pages(self) -> dict[str, Callable[[], Page]]:
        """By path."""
        return {"/metrics": self.metrics, "/healthz": self.health, "/readyz": self.readiness}

    def metrics(self) -> Page:
        """The node's and the agent's own, in the text format of Prometheus."""
        try:
            body = metrics.render(self._enrollment.node_status(), self._families())
        except RedirectorError as error:
            say(logging.WARNING, "metrics cannot be read", error=error)
            return Page(500, f"{error}\n".encode())
        return Page(200, body, metrics.CONTENT_TYPE)

    def health(self) -> Page:
        """Whether the loop comes round. An API server that is away is no reason to be restarted."""
        silent = self._clock() - self._agent.looked
        if silent > self._resync + _HANGING:
            return Page(503, f"the loop has not come round for {silent:.0f} s\n".encode())
        return Page(200, b"ok\n")

    def readiness(self) -> Page:
        """Whether what Kubernetes asked for at first has been carried out."""
        if self._agent.ready:
            return Page(200, b"ok\n")
        problems = "; ".join(self._api_problems()) or "the first look has not ended"
        return Page(503, f"{problems}\n".encode())

    def _families(self) -> Iterator[Metric]:
        executor = self._agent.executor
        done = CounterMetricFamily(
            "redirector_agent_actions",
            "Enrolments and changes of pods that the agent has carried out or failed to",
            labels=("action", "result"),
        )
        for result, counts in (("done", executor.done), ("failed", executor.failed)):
            for verb, count in counts.items():
                done.add_metric([verb.value, result], count)
        yield done
        wrong = GaugeMetricFamily(
            "redirector_agent_pod_problem",
            "1 for each pod that was refused, or could not be steered as asked; it keeps what it "
            "had",
            labels=("namespace", "pod", "reason"),
        )
        for problem in self._agent.notes.problems:
            namespace, _, name = problem.pod.rpartition("/")
            wrong.add_metric([namespace, name, problem.reason.name.lower()], 1)
        yield wrong
        up = GaugeMetricFamily(
            "redirector_agent_api_up", "Whether the API server's last answer was a good one"
        )
        up.add_metric([], 0 if self._api_problems() else 1)
        yield up
