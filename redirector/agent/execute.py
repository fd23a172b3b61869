"""Carries out actions, each for itself: one that fails is tried again later, others go on."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from redirector.agent.log import LOG, say
from redirector.agent.reconcile import Action, Verb
from redirector.apiserver.reflector import Backoff
from redirector.enrollment import Enrollment
from redirector.errors import RedirectorError
from redirector.kubernetes.places import Places

#: The first wait after a failure, and what it grows to; seconds.
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0


@dataclass
class Failure:
    """An action that failed, and when it may be tried again (clock)."""

    action: Action
    text: str
    #: How often in a row.
    count: int
    backoff: Backoff
    until: float


class Executor:
    """Turns actions into enrolments; remembers what failed."""

    def __init__(
        self,
        enrollment: Enrollment,
        places: Places,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enrollment = enrollment
        self._places = places
        self._clock = clock
        #: By the pod's name.
        self.failures: dict[str, Failure] = {}
        #: How many were carried out, and failed, since the start.
        self.done: dict[Verb, int] = dict.fromkeys(Verb, 0)
        self.failed: dict[Verb, int] = dict.fromkeys(Verb, 0)

    def forget_but(self, names: Iterable[str]) -> None:
        """Forget the failures of all other pods: nothing is to be done for them any more."""
        wanted = set(names)
        self.failures = {name: each for name, each in self.failures.items() if name in wanted}

    def carry_out(self, action: Action) -> None:
        """Do it, unless the same failed a moment ago. Raises nothing."""
        failure = self.failures.get(action.name)
        if failure is not None and failure.action.target != action.target:
            failure = None
        if failure is not None and self._clock() < failure.until:
            return
        began = self._clock()
        try:
            self._do(action)
        except Exception as error:
            # One pod must not stop the others, whatever is wrong with it.
            self.failed[action.verb] += 1
            backoff = failure.backoff if failure else Backoff(FIRST_WAIT, LONGEST_WAIT)
            until = self._clock() + backoff.next()
            text = str(error) or type(error).__name__
            if not isinstance(error, RedirectorError):
                text = f"pod {action.name}: {type(error).__name__}: {error}"
            known = failure is not None and failure.text == text
            count = failure.count + 1 if failure else 1
            self.failures[action.name] = Failure(action, text, count, backoff, until)
            if not isinstance(error, RedirectorError) and not known:
                LOG.exception("a bug: please report it")
            return
        self.failures.pop(action.name, None)
        self.done[action.verb] += 1
        fields: dict[str, object] = {"pod": action.name, "why": action.why}
        if action.target is not None:
            fields["mode"] = action.target.mode
        say(logging.INFO, action.verb, **fields, took_ms=round((self._clock() - began) * 1000))

    def _do(self, action: Action) -> None:
        target = action.target
        if action.verb in (Verb.UNENROLL, Verb.REPLACE):
            self._enrollment.unenroll(action.name)
        if action.verb in (Verb.ENROLL, Verb.REPLACE) and target is not None:
            self._enrollment.enroll(
                action.name,
                target.netns,
                target.cgroup,
                target.mode,
                target.accelerate,
                target.steering,
                uid=target.uid,
            )
        elif action.verb in (Verb.UPDATE, Verb.REPAIR) and target is not None:
            self._enrollment.update(
                action.name,
                mode=target.mode,
                accelerate=target.accelerate,
                steering=target.steering,
                netns=target.netns,
            )
        elif action.verb is Verb.REPAIR:
            record = self._enrollment.get(action.name)
            self._enrollment.update(action.name, netns=self._places.again(record))
