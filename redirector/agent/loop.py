"""The agent's loop: look, compare, act; again when something changed, and now and then anyway."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from redirector.agent.execute import Executor
from redirector.agent.log import LOG, say
from redirector.agent.notes import Notes, Problem, Reason
from redirector.agent.reconcile import Action, Known, Target, Verb, plan
from redirector.enrollment import Enrollment
from redirector.errors import RedirectorError
from redirector.kubernetes.cluster import View
from redirector.kubernetes.desired import Refusal, Verdict, Wish, desired
from redirector.kubernetes.objects import PodObject
from redirector.kubernetes.places import Place, Places, populated
from redirector.model import Accelerate, IPAddress, Mode, Pod, Steering
from redirector.resolvers import lacks_resolvers, with_resolvers

#: Seconds between two looks, however much changes; and while a pod that is asked for is not there.
_PAUSE, _EXPECTING = 0.05, 0.25
_AFTER_ERROR = 5.0
#: After so long a pod that runs and is not found is a mistake of somebody's.
_LOST = 10.0


class Source(Protocol):
    """Whose wishes are carried out: `redirector.kubernetes.cluster.Cluster`."""

    def view(self) -> View | None:
        """What is known; None while that is nothing."""

    def warn(self, pod: PodObject, reason: str, text: str) -> None:
        """Tell the owner of a pod."""


@dataclass(frozen=True)
class Settings:
    """How the agent behaves; times in seconds."""

    #: For pods that neither their own annotations nor their namespace's say anything of.
    default: Mode | None = None
    #: For pods whose annotations do not say it.
    accelerate: Accelerate = Accelerate.AUTO
    #: How often what is enrolled is compared with the kernel.
    resync: float = 30.0


class Agent:
    """One node's. `source` None: nobody is asked, what is enrolled is kept whole."""

    def __init__(
        self,
        enrollment: Enrollment,
        places: Places,
        source: Source | None,
        settings: Settings,
        changed: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enrollment = enrollment
        self._places = places
        self._source = source
        self._settings = settings
        self._clock = clock
        self._next_resync = clock()
        #: Since when (clock) a pod that runs, by UID, has not been found.
        self._unseen: dict[str, float] = {}
        #: Why one that was found cannot be steered yet, by UID.
        self._reasons: dict[str, str] = {}
        #: By UID; read anew with every comparison.
        self._resolvers: dict[str, tuple[IPAddress, ...] | None] = {}
        #: Set, by any thread, when there is something new to look at.
        self._changed = changed
        self._stopping = False
        self.executor = Executor(enrollment, places, clock)
        self.notes = Notes(self._tell, enrollment.keep_problems)
        #: When the last look ended (clock).
        self.looked = clock()
        #: Whether a look has followed the first complete lists.
        self.ready = False

    def stop(self) -> None:
        """End after the action that is being carried out; pods stay as they are."""
        self._stopping = True
        self._changed.set()

    def run(self) -> None:
        """Look and act until `stop`."""
        while not self._stopping:
            self._changed.clear()
            try:
                wait = self.step()
            except Exception as error:
                # Pods stay steered without us, but an agent that has ended repairs nothing.
                LOG.exception("a look failed: %s", error)
                wait = _AFTER_ERROR
            if not self._stopping:
                self._changed.wait(wait)
            if not self._stopping:
                time.sleep(_PAUSE)

    def step(self) -> float:
        """Look once and act; return the seconds until there may be reason to look again."""
        resyncing = self._clock() >= self._next_resync
        if resyncing:
            self._next_resync = self._clock() + self._settings.resync
            self._places.forget()
            self._resolvers.clear()
        waits = [self._next_resync]
        if self._source is None:
            self._keep_whole(resyncing)
            self.ready = True
        else:
            view = self._source.view()
            if view is not None:
                if self._follow(view, resyncing or not self.ready):
                    waits.append(self._clock() + _EXPECTING)
                self.ready = True
        if resyncing:
            self._sweep()
        self.looked = self._clock()
        waits += [failure.until for failure in self.executor.failures.values()]
        return max(0.0, min(waits) - self._clock())

    def _keep_whole(self, resyncing: bool) -> None:
        incomplete = self._incomplete(self._enrollment.readable(), resyncing)
        self._act(
            [
                Action(Verb.REPAIR, name, f"lacks {', '.join(parts)}")
                for name, parts in incomplete.items()
            ]
        )
        self._note((), {})

    def _follow(self, view: View, resyncing: bool) -> bool:
        """Return whether a pod that is asked for has no process yet."""
        verdicts = desired(
            view.pods, view.namespaces, self._settings.default, self._settings.accelerate
        )
        records = self._enrollment.readable()
        by_hand = {record.name for record in records if not record.uid}
        for name, verdict in verdicts.items():
            if name in by_hand and isinstance(verdict, Wish):
                verdicts[name] = _taken(verdict)
        self._reasons.clear()
        known = {pod.full_name: self._know(pod, verdicts[pod.full_name]) for pod in view.pods}
        self._act(
            plan(
                known,
                records,
                {r.name for r in records if r.name not in known and populated(r.cgroup)},
                self._incomplete(records, resyncing),
            )
        )
        refusals = [verdict for verdict in verdicts.values() if isinstance(verdict, Refusal)]
        expected = [
            each.verdict.pod
            for each in known.values()
            if isinstance(each.verdict, Wish) and each.target is None
        ]
        self._note(refusals, {pod.full_name: pod for pod in view.pods}, self._lost(expected))
        return bool(expected)

    def _lost(self, expected: Iterable[PodObject]) -> list[Problem]:
        """Those whose containers run, says the API server, and that cannot be steered yet."""
        now = self._clock()
        running = [pod for pod in expected if pod.running]
        self._unseen = {pod.uid: self._unseen.get(pod.uid, now) for pod in running}
        return [
            Problem(
                pod.full_name,
                Reason.FAILED,
                self._reasons.get(pod.uid)
                or f"pod {pod.full_name}: runs on this node, but no cgroup of UID "
                f"{pod.kubelet_uid} with a network of its own is below {self._places.cgroups}; "
                "see --cgroup-root",
            )
            for pod in running
            if now - self._unseen[pod.uid] >= _LOST
        ]

    def _act(self, actions: list[Action]) -> None:
        self.executor.forget_but(action.name for action in actions)
        for action in actions:
            if not self._stopping:
                self.executor.carry_out(action)

    def _sweep(self) -> None:
        """Let go of what no connection needs any more."""
        try:
            self._enrollment.sweep()
            if forgotten := self._enrollment.forget_closed():
                say(logging.INFO, "forgot flows of closed connections", number=forgotten)
        except RedirectorError as error:
            say(logging.WARNING, "what has ended stays", error=error)

    def _know(self, pod: PodObject, verdict: Verdict) -> Known:
        place = self._places.find(pod) if isinstance(verdict, Wish) else None
        if place is None or not isinstance(verdict, Wish):
            return Known(pod.kubelet_uid, verdict)
        try:
            steering = self._with_resolvers(verdict, place)
        except RedirectorError as error:
            # Its first containers may have none: like a pod that has no process yet.
            self._reasons[pod.uid] = str(error)
            return Known(pod.kubelet_uid, verdict)
        return Known(pod.kubelet_uid, verdict, _target(verdict, place, steering))

    def _with_resolvers(self, wish: Wish, place: Place) -> Steering:
        """The steering asked for, with the pod's own resolvers where it names none."""
        steering = wish.steering
        if not lacks_resolvers(steering):
            return steering
        before = self._resolvers.get(wish.pod.uid)
        if before is None:
            name = wish.pod.full_name
            before = with_resolvers(name, steering, place.netns, place.cgroup).dns_servers
            self._resolvers[wish.pod.uid] = before
        return replace(steering, dns_servers=before)

    def _incomplete(self, records: Iterable[Pod], resyncing: bool) -> dict[str, tuple[str, ...]]:
        """What each lacks; between two comparisons only those are looked at that failed."""
        found: dict[str, tuple[str, ...]] = {}
        for record in records:
            if not resyncing and record.name not in self.executor.failures:
                continue
            try:
                missing = self._enrollment.missing(record)
                if not missing and self._enrollment.interrupted(record):
                    missing = ("the end of a change",)
            except RedirectorError as error:
                missing = (str(error),)
            if missing:
                found[record.name] = missing
        return found

    def _note(
        self,
        refusals: Iterable[Refusal],
        pods: Mapping[str, PodObject],
        lost: Iterable[Problem] = (),
    ) -> None:
        problems = [Problem(r.pod.full_name, Reason.REFUSED, r.text) for r in refusals]
        problems += [
            Problem(name, Reason.FAILED, failure.text)
            for name, failure in self.executor.failures.items()
            # What is put right at the second try is not worth a word.
            if failure.count > 1
        ]
        problems += lost
        self.notes.take(problems, pods)

    def _tell(self, pod: PodObject, reason: str, text: str) -> None:
        if self._source is not None:
            self._source.warn(pod, reason, text)


def _taken(wish: Wish) -> Refusal:
    name = wish.pod.full_name
    return Refusal(
        wish.pod,
        f"pod {name}: was enrolled by hand and is left alone; hand it over with "
        f"'redirector unenroll {name}'",
    )


def _target(wish: Wish, place: Place, steering: Steering) -> Target:
    return Target(
        uid=wish.pod.kubelet_uid,
        cgroup=place.cgroup,
        netns=place.netns,
        netns_cookie=place.netns_cookie,
        mode=wish.mode,
        accelerate=wish.accelerate,
        steering=steering,
    )
