"""Commands are killed at any moment under traffic: it goes on, never past the sidecar."""

import multiprocessing
import random
import signal
import time
from collections.abc import Callable

import pytest
import traces
from traffic import Busy, Phase, both_ways, busy_pods
from waiting import eventually

from redirector.datapath.layout import Room
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import Mode

pytestmark = pytest.mark.root

ROUNDS = 10


class Killer:
    """Runs commands in processes and kills them at a random moment of their length."""

    def __init__(self) -> None:
        self.killed = 0
        self._chance = random.Random(3)
        self._length_s: dict[str, float] = {}

    def run(self, name: str, command: Callable[[], object]) -> None:
        """To its end the first time, to learn its length."""
        context = multiprocessing.get_context("fork")
        process = context.Process(target=command)
        began = time.monotonic()
        process.start()
        if name in self._length_s:
            process.join(self._chance.uniform(0, self._length_s[name]))
            process.kill()
            process.join()
            self.killed += process.exitcode == -signal.SIGKILL
        else:
            process.join()
            assert process.exitcode == 0
            self._length_s[name] = time.monotonic() - began


def test_killed_at_any_moment_under_traffic(
    node: Node, enrollment: Enrollment, datapath: Datapath
) -> None:
    datapath.ensure()
    pod, peer = busy_pods(node)
    killer = Killer()
    with both_ways(pod, peer, Phase.FREE) as there:
        there.flow()
        for turn in range(ROUNDS):
            mode, other = list(Mode) if turn % 2 else list(reversed(Mode))
            live_and_die(killer, there, enrollment, mode, other)
    assert killer.killed > ROUNDS, "commands were done before they were killed"
    eventually("the end of all flows", lambda: datapath.maps.fills()["flows"][0] == 0)
    assert datapath.maps.room(Room.TAKEN) == 0
    # What keeps the NAT of open connections goes with the next unenrolment after they are closed.
    enroll(enrollment, pod, Mode.IPTABLES)
    enrollment.unenroll("pod")
    assert traces.in_pod(pod) == []
    assert enrollment.pods() == []


def enroll(enrollment: Enrollment, pod: LabPod, mode: Mode) -> None:
    enrollment.enroll("pod", pod.netns, pod.cgroup, mode)


def live_and_die(
    killer: Killer, there: Busy, enrollment: Enrollment, mode: Mode, other: Mode
) -> None:
    pod = there.pod
    there.enter(Phase.CHANGING)
    killer.run(f"enroll {mode}", lambda: enroll(enrollment, pod, mode))
    there.flow()
    if enrollment.pods():
        enrollment.change_mode("pod", mode)
    else:
        enroll(enrollment, pod, mode)
    there.enter(Phase.ENROLLED)
    there.flow()
    for wanted in (other, mode, other):
        killer.run(f"to {wanted}", lambda wanted=wanted: enrollment.change_mode("pod", wanted))
        there.flow()
    enrollment.change_mode("pod", mode)
    assert enrollment.missing(enrollment.get("pod")) == ()
    there.flow()
    there.enter(Phase.CHANGING)
    killer.run(f"unenroll {mode}", lambda: enrollment.unenroll("pod"))
    there.flow()
    if enrollment.pods():
        enrollment.unenroll("pod")
    there.enter(Phase.FREE)
    there.flow()
