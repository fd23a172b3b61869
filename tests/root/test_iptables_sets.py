"""The iptables mode with lists of 10,000 ranges, on the real kernel, with both flavours."""

from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

import probes
import pytest
from lists import long_lists
from xtables import as_pod, saved, sets

from redirector import machine
from redirector.enrollment import Enrollment
from redirector.errors import DatapathError, MachineError
from redirector.lab import Node
from redirector.model import Mode, Steering
from redirector.modes.iptables.driver import IptablesMode
from redirector.steering import Connection, Direction, Verdict, decide

pytestmark = pytest.mark.root

DRIVER = IptablesMode()
PORT = 80


@pytest.fixture
def short() -> Steering:
    return Steering(exclude_outbound_cidrs=(IPv4Network("11.0.0.0/8"), IPv6Network("fd65::/16")))


@pytest.mark.usefixtures("path")
def test_ten_thousand_ranges_steer_as_the_rules_say(node: Node) -> None:
    lab, *others = (node.pod(name) for name in ("pod", "included", "both", "neither"))
    probes.start(lab, [(Verdict.OUTBOUND, 15001)], sidecar=True)
    for each in others:
        probes.start(each, [(Verdict.DIRECT, PORT)])
    pod = as_pod(lab, long_lists(*others[:2]))
    DRIVER.install(pod)
    assert DRIVER.missing(pod) == []
    expected = [Verdict.OUTBOUND, Verdict.DIRECT, Verdict.DIRECT]
    for address in (lambda each: each.ip), (lambda each: each.ip6):
        calls = [probes.Call(ip_address(address(each)), PORT) for each in others]
        assert [arrival.verdict for arrival in lab.call(probes.dial, calls)] == expected
        for call, verdict in zip(calls, expected, strict=True):
            connection = Connection(
                Direction.OUTBOUND, call.destination, call.port, own=pod.addresses
            )
            assert decide(pod.steering, connection).verdict == verdict
    # One rule asks for a whole list: what a connection meets does not grow with it.
    rules = saved(lab)
    assert len(rules.splitlines()) < 50
    assert rules.count("--match-set") == 4
    DRIVER.remove(pod)
    assert "REDIRECTOR" not in saved(lab)
    assert sets(lab) == []


@pytest.mark.usefixtures("path")
def test_other_lists_are_other_sets(node: Node, short: Steering) -> None:
    lab, other = node.pod("pod"), node.pod("other")
    pod = as_pod(lab, long_lists(other, other))
    DRIVER.install(pod)
    first = sets(lab)
    DRIVER.install(pod)
    assert sets(lab) == first
    longer = replace(
        pod.steering,
        exclude_outbound_cidrs=(*pod.steering.exclude_outbound_cidrs, ip_network("12.0.0.0/8")),
    )
    DRIVER.install(as_pod(lab, longer))
    assert len(sets(lab)) == len(first) == 4
    assert len(set(sets(lab)) & set(first)) == 3
    assert DRIVER.missing(as_pod(lab, longer)) == []
    assert DRIVER.missing(pod) != []
    DRIVER.install(as_pod(lab, short))
    assert sets(lab) == []
    DRIVER.remove(as_pod(lab, short))


@pytest.mark.usefixtures("path")
def test_a_set_that_somebody_changed_is_missed_and_mended(node: Node) -> None:
    lab, other = node.pod("pod"), node.pod("other")
    pod = as_pod(lab, long_lists(other, other))
    DRIVER.install(pod)
    emptied, changed, *_ = sets(lab)
    lab.run(["ipset", "flush", emptied], check=True)
    members = lab.run(["ipset", "save", changed], check=True).stdout.splitlines()[1:]
    lab.run(["ipset", "del", changed, members[0].split()[2]], check=True)
    stranger = "9.9.9.9" if "." in members[0] else "fd09::9"
    lab.run(["ipset", "add", changed, stranger], check=True)
    assert DRIVER.missing(pod) == [
        f"set {name} as it was installed: somebody changed it" for name in (emptied, changed)
    ]
    DRIVER.install(pod)
    assert DRIVER.missing(pod) == []
    # Rules hold their sets: only who takes the rules away can destroy one.
    lab.run(["iptables", "-t", "nat", "-F"], check=True)
    DRIVER.remove(pod)
    assert sets(lab) == []


@pytest.mark.usefixtures("path")
def test_sets_of_others_stay(node: Node) -> None:
    lab, other = node.pod("pod"), node.pod("other")
    lab.run(["ipset", "create", "theirs", "hash:ip"], check=True)
    pod = as_pod(lab, long_lists(other, other))
    DRIVER.install(pod)
    DRIVER.remove(pod)
    assert sets(lab) == ["theirs"]


def test_long_lists_of_ports(node: Node) -> None:
    lab, other = node.pod("pod"), node.pod("other")
    probes.start(lab, [(Verdict.OUTBOUND, 15001)], sidecar=True)
    probes.start(other, [(Verdict.DIRECT, port) for port in (PORT, 8080)])
    even = frozenset(range(2, 3000, 2)) - {PORT}
    pod = as_pod(lab, Steering(exclude_outbound_ports=even | {8080}))
    DRIVER.install(pod)
    assert len(sets(lab)) == 1
    for ip in other.ip, other.ip6:
        calls = [probes.Call(ip_address(ip), port) for port in (PORT, 8080)]
        verdicts = [each.verdict for each in lab.call(probes.dial, calls)]
        assert verdicts == [Verdict.OUTBOUND, Verdict.DIRECT]
    DRIVER.remove(pod)
    assert sets(lab) == []


def test_without_ipset_only_long_lists_fail(
    node: Node, monkeypatch: pytest.MonkeyPatch, short: Steering
) -> None:
    def no_ipset(name: str, package: str) -> Path:
        return machine.find_tool(name.replace("ipset", "not-installed-ipset"), package)

    lab, other = node.pod("pod"), node.pod("other")
    monkeypatch.setattr("redirector.modes.iptables.programs.find_tool", no_ipset)
    DRIVER.install(as_pod(lab, short))
    assert DRIVER.missing(as_pod(lab, short)) == []
    DRIVER.remove(as_pod(lab, short))
    with pytest.raises(MachineError, match=r"ipset is not installed; .* apt-get install ipset"):
        DRIVER.install(as_pod(lab, long_lists(other, other)))
    assert "REDIRECTOR" not in saved(lab)


def test_a_failure_after_the_sets_leaves_none(node: Node, path: Path) -> None:
    lab, other = node.pod("pod"), node.pod("other")
    program = path / "ip6tables-restore"
    program.unlink()
    program.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(DatapathError, match="out of memory"):
        DRIVER.install(as_pod(lab, long_lists(other, other)))
    assert "REDIRECTOR" not in saved(lab)
    assert sets(lab) == []


def test_enrolment_with_long_lists_is_undone_whole(node: Node, enrollment: Enrollment) -> None:
    lab, other = node.pod("pod"), node.pod("other")
    enrollment.enroll(
        "pod", lab.netns, lab.cgroup, Mode.IPTABLES, steering=long_lists(other, other)
    )
    (status,) = enrollment.status()
    assert status.missing == ()
    assert len(sets(lab)) == 4
    enrollment.unenroll("pod")
    assert sets(lab) == []
