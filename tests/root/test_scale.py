"""What is done for one pod does not grow with the pods of the node. Counted, not timed."""

import cProfile
import pstats
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network, ip_network
from pathlib import Path

import pytest

from redirector.datapath import libbpf, source
from redirector.datapath.layout import PodEntry
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.errors import DatapathError
from redirector.lab import LabPod, Node
from redirector.model import Mode, Steering
from redirector.records import Records

pytestmark = pytest.mark.root

MANY = 200


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(prefix="rdrtest", subnet=IPv4Network("10.77.0.0/16")) as made:
        yield made


def work(act: Callable[[], object]) -> int:
    """How many functions are called, Python's and C's: kernel calls are among them."""
    profile = cProfile.Profile()
    profile.runcall(act)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_enrolling_one_more_costs_the_same(node: Node, enrollment: Enrollment) -> None:
    def enroll(pod: LabPod, mode: Mode = Mode.EBPF) -> None:
        enrollment.enroll(pod.name, pod.netns, pod.cgroup, mode)

    def life(pod: LabPod, mode: Mode) -> list[int]:
        """The price of each step of a pod's life."""
        other = Mode.IPTABLES if mode is Mode.EBPF else Mode.EBPF
        return [
            work(lambda: enroll(pod, mode)),
            work(lambda: enrollment.change_mode(pod.name, mode)),
            work(lambda: enrollment.change_mode(pod.name, other)),
            work(lambda: enrollment.unenroll(pod.name)),
        ]

    enroll(node.pod("first"))  # loads the programs
    probes = [node.pod(f"probe{n}") for n in range(4)]
    for mode, pod in zip(Mode, probes[:2], strict=True):
        life(pod, mode)  # what is done once a process
    few = [life(pod, mode) for mode, pod in zip(Mode, probes[:2], strict=True)]
    for n in range(MANY):
        enroll(node.pod(f"p{n}"))
    many = [life(pod, mode) for mode, pod in zip(Mode, probes[2:], strict=True)]
    for before, after in zip(few, many, strict=True):
        for step, (little, much) in enumerate(zip(before, after, strict=True)):
            assert much < little * 1.05 + 20, (step, few, many)


def entries(datapath: Datapath) -> dict[str, int]:
    return {name: used for name, (used, _) in datapath.maps.fills().items()}


def test_lists_of_an_interrupted_change_do_not_stay(
    node: Node, pins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says what the pod had; nobody looks through whole maps for it."""
    datapath = Datapath(pins)
    enrollment = Enrollment(Records(tmp_path / "pods"), datapath)
    datapath.ensure()
    before = entries(datapath)
    pod = node.pod("pod")

    def steering(n: int) -> Steering:
        return Steering(
            exclude_outbound_cidrs=(ip_network(f"198.51.100.{n}/32"),),
            exclude_outbound_ports=frozenset({n}),
        )

    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, steering=steering(1))
    for n in (2, 3):
        with monkeypatch.context() as patched:

            def refused(*_: object) -> None:
                raise DatapathError("as if killed")

            patched.setattr(Datapath, "attach", refused)
            with pytest.raises(DatapathError, match="as if killed"):
                enrollment.update("pod", steering=steering(n))
    enrollment.update("pod", steering=steering(4))
    # Of all the forms it had, the last one's lists are there.
    now = entries(datapath)
    own = len(enrollment.get("pod").of_links)
    assert now["cidrs"] == before["cidrs"] + own + 1
    assert now["members"] == before["members"] + 4
    enrollment.unenroll("pod")
    assert entries(datapath) == before


def test_entries_that_come_in_a_rush_find_memory(datapath: Datapath) -> None:
    """The kernel refills what maps take from in the background; who is faster must wait."""
    datapath.ensure()
    # No namespace has such a cookie.
    rush = range(1 << 60, (1 << 60) + source.SIZES["MAX_PODS"] - 100)
    try:
        for cookie in rush:
            datapath.maps.put_pod(cookie, PodEntry())
        assert entries(datapath)["pods"] >= len(rush)
    finally:
        for name in ("pods", "counters"):
            with libbpf.opened(datapath.generation.directory / "maps" / name) as fd:
                libbpf.map_delete_many(fd, [cookie.to_bytes(8, "little") for cookie in rush])
