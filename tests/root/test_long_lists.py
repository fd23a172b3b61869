"""Lists of 10,000 ranges in eBPF mode, on the real kernel; those of iptables mode: their sets."""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import probes
import pytest
from lists import ENTRIES, filler, long_lists

from redirector.datapath.pins import Datapath
from redirector.datapath.source import SIZES
from redirector.enrollment import Enrollment
from redirector.errors import DatapathError
from redirector.lab import Node
from redirector.machine import ensure_bpffs
from redirector.model import Mode, Steering
from redirector.records import Records
from redirector.steering import Connection, Direction, Verdict, decide

pytestmark = pytest.mark.root

PORT = 80


def entries(datapath: Datapath) -> int:
    used, _ = datapath.maps.fills()["cidrs"]
    return used


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Datapath, Enrollment]]:
    """Programs whose maps hold one pod's lists and not another's."""
    datapath = Datapath(
        ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}", {**SIZES, "MAX_CIDRS": 6 * ENTRIES}
    )
    enrollment = Enrollment(Records(tmp_path / "pods"), datapath)
    yield datapath, enrollment
    enrollment.uninstall()


def test_ten_thousand_ranges_steer_as_the_rules_say(
    node: Node, datapath: Datapath, enrollment: Enrollment
) -> None:
    lab, *others = (node.pod(name) for name in ("pod", "included", "both", "neither"))
    probes.start(lab, [(Verdict.OUTBOUND, 15001)], sidecar=True)
    for each in others:
        probes.start(each, [(Verdict.DIRECT, PORT)])
    datapath.ensure()
    before = entries(datapath)
    pod = enrollment.enroll(
        "pod", lab.netns, lab.cgroup, Mode.EBPF, steering=long_lists(*others[:2])
    )
    assert entries(datapath) > before + 2 * ENTRIES
    for address in (lambda each: each.ip), (lambda each: each.ip6):
        calls = [probes.Call(ip_address(address(each)), PORT) for each in others]
        verdicts = [arrival.verdict for arrival in lab.call(probes.dial, calls)]
        assert verdicts == [Verdict.OUTBOUND, Verdict.DIRECT, Verdict.DIRECT]
        for call, verdict in zip(calls, verdicts, strict=True):
            connection = Connection(
                Direction.OUTBOUND, call.destination, call.port, own=pod.addresses
            )
            assert decide(pod.steering, connection).verdict == verdict
    # Other lists take their place: the pod that was in none is in them, the others are not.
    third = Steering(
        include_outbound_cidrs=filler("100.64.0.0/10", "fd64::/16")
        + tuple(map(ip_network, (others[2].ip, others[2].ip6)))
    )
    enrollment.update("pod", steering=third)
    ranges = (*third.include_outbound_cidrs, *enrollment.get("pod").of_links)
    assert entries(datapath) == before + len(ranges)
    calls = [probes.Call(ip_address(each.ip), PORT) for each in others]
    verdicts = [arrival.verdict for arrival in lab.call(probes.dial, calls)]
    assert verdicts == [Verdict.DIRECT, Verdict.DIRECT, Verdict.OUTBOUND]
    enrollment.unenroll("pod")
    assert entries(datapath) == before


def test_lists_that_do_not_fit_are_refused_whole(
    node: Node, small: tuple[Datapath, Enrollment]
) -> None:
    datapath, enrollment = small
    one, two = node.pod("one"), node.pod("two")
    lists = long_lists(one, two)
    enrollment.enroll("one", one.netns, one.cgroup, Mode.EBPF, steering=lists)
    used = entries(datapath)
    with pytest.raises(DatapathError, match=r"map cidrs: .*the map is full"):
        enrollment.enroll("two", two.netns, two.cgroup, Mode.EBPF, steering=lists)
    assert [pod.name for pod in enrollment.pods()] == ["one"]
    assert datapath.pods() == ["one"]
    assert entries(datapath) == used
    # Neither does a longer list of a pod that is enrolled: it keeps what it has.
    longer = replace(
        lists,
        exclude_outbound_cidrs=filler("12.0.0.0/8", "fd66::/16")
        + filler("13.0.0.0/8", "fd67::/16"),
    )
    with pytest.raises(DatapathError, match=r"map cidrs: .*the map is full"):
        enrollment.update("one", steering=longer)
    assert entries(datapath) == used
    assert enrollment.get("one").steering == lists
    assert enrollment.missing(enrollment.get("one")) == ()
