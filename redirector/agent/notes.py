"""What is wrong with which pod: told once in the log and to the pod's owner, kept for `status`."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from redirector.agent.log import say
from redirector.kubernetes.objects import PodObject


class Reason(StrEnum):
    """Why a pod is not as somebody wants it; the value is the Event's reason."""

    REFUSED = "SteeringRefused"
    FAILED = "SteeringFailed"


@dataclass(frozen=True)
class Problem:
    """One pod's; `text` names the pod and what is wrong."""

    pod: str
    reason: Reason
    text: str


class Notes:
    """The problems as of the last look."""

    def __init__(
        self,
        tell: Callable[[PodObject, str, str], None],
        keep: Callable[[Mapping[str, str]], None],
    ) -> None:
        self._tell = tell
        self._keep = keep
        #: None before the first look: what an earlier agent kept is not true any more.
        self._problems: dict[str, Problem] | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Those of the last look, by pod."""
        return tuple((self._problems or {}).values())

    def take(self, problems: Iterable[Problem], pods: Mapping[str, PodObject]) -> None:
        """These are the problems now; what is new of them is told."""
        old = self._problems or {}
        new = {problem.pod: problem for problem in sorted(problems, key=lambda p: p.pod)}
        for name, problem in new.items():
            if old.get(name) != problem:
                say(logging.WARNING, problem.text, pod=name, reason=problem.reason)
                if name in pods:
                    self._tell(pods[name], problem.reason, problem.text)
        for name in old.keys() - new.keys():
            say(logging.INFO, "nothing is wrong any more", pod=name)
        if self._problems is None or old != new:
            self._keep({name: problem.text for name, problem in new.items()})
        self._problems = new
