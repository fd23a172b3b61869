"""Commands killed at random points in iptables mode, with sets and every table in use."""

import contextlib
import multiprocessing
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest
import traces

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.errors import AlreadyEnrolled, NotEnrolled
from redirector.lab import LabPod, Node
from redirector.machine import ensure_bpffs
from redirector.model import Mode, Steering
from redirector.modes.iptables.sets import MOST_RULES
from redirector.network import run_in
from redirector.records import Records

pytestmark = pytest.mark.root

ROUNDS = 12


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Enrollment]:
    """With records and pins of its own, so that it can be uninstalled."""
    pins = ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}"
    made = Enrollment(Records(tmp_path / "pods"), Datapath(pins))
    yield made
    made.uninstall()


@pytest.fixture
def pod(node: Node) -> LabPod:
    return node.pod("pod")


#: Just long enough for sets.
LISTS = Steering(
    include_outbound_cidrs=tuple(ip_network(f"10.{n}.0.0/16") for n in range(MOST_RULES + 1)),
    exclude_outbound_cidrs=tuple(ip_network(f"fd00:{n:x}::/32") for n in range(MOST_RULES + 1)),
)
#: With a rule in each table.
EVERYTHING = replace(LISTS, dns_capture=True, dns_servers=None, drop_invalid=True)


def seconds(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def killed(action: Callable[[], object], after_s: float) -> bool:
    """Run in a child and kill that; whether it was still at work."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(after_s)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def test_enroll(alone: Enrollment, pod: LabPod) -> None:
    def enroll() -> None:
        alone.enroll("pod", pod.netns, pod.cgroup, Mode.IPTABLES, steering=EVERYTHING)

    longest_s = seconds(enroll)
    alone.unenroll("pod")
    chance = random.Random("enroll")
    hits = 0
    for n in range(ROUNDS):
        hits += killed(enroll, longest_s * chance.random())
        if n % 2:
            try:
                enroll()
            except AlreadyEnrolled:
                alone.change_mode("pod", Mode.IPTABLES)
            (status,) = alone.status()
            assert status.missing == ()
        assert alone.uninstall() == []
        assert traces.in_pod(pod) == []
    assert hits, "every enroll was done before it was killed"


def test_unenroll(alone: Enrollment, pod: LabPod) -> None:
    def enroll() -> None:
        alone.enroll("pod", pod.netns, pod.cgroup, Mode.IPTABLES, steering=EVERYTHING)

    def unenroll() -> None:
        alone.unenroll("pod")

    enroll()
    longest_s = seconds(unenroll)
    chance = random.Random("unenroll")
    hits = 0
    for _ in range(ROUNDS):
        enroll()
        hits += killed(unenroll, longest_s * chance.random())
        with contextlib.suppress(NotEnrolled):
            unenroll()
        assert traces.in_pod(pod) == []
    assert hits, "every unenroll was done before it was killed"


@pytest.mark.parametrize(
    ("before", "after"), [(Mode.EBPF, Mode.IPTABLES), (Mode.IPTABLES, Mode.EBPF)]
)
def test_mode(alone: Enrollment, pod: LabPod, before: Mode, after: Mode) -> None:
    def enroll() -> None:
        alone.enroll("pod", pod.netns, pod.cgroup, before, steering=LISTS)

    def change() -> None:
        alone.change_mode("pod", after)

    enroll()
    # The first one may have to load the programs.
    change()
    alone.change_mode("pod", before)
    longest_s = seconds(change)
    alone.unenroll("pod")
    chance = random.Random(before)
    hits = 0
    for n in range(ROUNDS):
        enroll()
        hits += killed(change, longest_s * chance.random())
        if n % 2:
            change()
            (status,) = alone.status()
            assert (status.pod.mode, status.missing) == (after, ())
        alone.unenroll("pod")
        assert traces.in_pod(pod) == []
    assert hits, "every change was done before it was killed"


def test_the_next_command_waits_for_what_the_killed_one_had_started(tmp_path: Path) -> None:
    """A program outlives whom it works for; what it changes must not come after a clean-up."""
    records, started, done = Records(tmp_path / "pods"), tmp_path / "started", tmp_path / "done"

    def change() -> None:
        script = f"touch {started}; sleep 0.3; touch {done}"
        with records.locked():
            run_in(Path("/proc/self/ns/net"), ["sh", "-c", script])

    child = multiprocessing.get_context("fork").Process(target=change)
    child.start()
    while not started.exists():
        assert child.is_alive()
        time.sleep(0.001)
    child.kill()
    child.join()
    with records.locked():
        assert done.exists()
