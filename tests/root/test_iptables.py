"""The iptables mode on the real kernel, with both flavours of iptables."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from socket import socket

import probes
import pytest
from xtables import as_pod, saved

from redirector.errors import DatapathError, InputError, MachineError
from redirector.lab import LabPod, Node
from redirector.model import IPAddress, Mode, Pod, Steering
from redirector.modes.iptables.driver import IptablesMode
from redirector.modes.iptables.tables import KEEP_CHAIN
from redirector.network import open_connections, within
from redirector.steering import Verdict

pytestmark = pytest.mark.root

DRIVER = IptablesMode()
STEERED_OUT = (Verdict.DIRECT, Verdict.OUTBOUND)
STEERED_IN = (Verdict.DIRECT, Verdict.INBOUND)


@pytest.fixture
def peers(node: Node) -> tuple[LabPod, LabPod]:
    """Two pods: the first has a sidecar and an application, the second just an application."""
    first, second = node.pod("first"), node.pod("second")
    sidecar = [(Verdict.OUTBOUND, 15001), (Verdict.INBOUND, 15006)]
    probes.start(first, sidecar, sidecar=True)
    for pod in (first, second):
        probes.start(pod, [(Verdict.DIRECT, 80)])
    return first, second


def connect(lab: LabPod, destination: str, port: int = 80) -> tuple[socket, probes.Arrival]:
    call = probes.Call(ip_address(destination), port)
    return within(lab.netns, lambda: probes.connect(call))


def arrival(lab: LabPod, destination: str, port: int = 80) -> probes.Arrival:
    connection, arrived = connect(lab, destination, port)
    connection.close()
    return arrived


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + probes.TIMEOUT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ips(first: LabPod, second: LabPod) -> list[tuple[str, str]]:
    return [(first.ip, second.ip), (first.ip6, second.ip6)]


@pytest.mark.usefixtures("path")
def test_steers_both_families_and_keeps_the_original_destination(
    peers: tuple[LabPod, LabPod],
) -> None:
    first, second = peers
    DRIVER.install(as_pod(first))
    assert DRIVER.missing(as_pod(first)) == []
    for own, other in ips(first, second):
        client: IPAddress = ip_address(own)
        target: IPAddress = ip_address(other)
        assert arrival(first, other) == probes.Arrival(Verdict.OUTBOUND, target, 80, client)
        assert arrival(second, own) == probes.Arrival(Verdict.INBOUND, client, 80, target)


@pytest.mark.usefixtures("path")
def test_second_install_changes_nothing(node: Node) -> None:
    lab = node.pod("a")
    DRIVER.install(as_pod(lab))
    before = saved(lab)
    DRIVER.install(as_pod(lab))
    assert saved(lab) == before
    assert before.count("-j REDIRECTOR_OUTPUT") == 2, before


@pytest.mark.usefixtures("path")
def test_install_with_other_options_replaces_the_rules(node: Node) -> None:
    lab = node.pod("a")
    other = as_pod(lab, Steering(exclude_outbound_ports=frozenset(range(1, 40))))
    DRIVER.install(as_pod(lab))
    assert "IPv4 jump from chain OUTPUT of table nat" in DRIVER.missing(other)
    DRIVER.install(other)
    assert DRIVER.missing(other) == []
    DRIVER.remove(other)
    DRIVER.install(other)
    assert DRIVER.missing(other) == []


@pytest.mark.usefixtures("path")
def test_remove_leaves_nothing_of_ours_and_all_that_is_not(node: Node) -> None:
    lab = node.pod("a")
    theirs = "-A OUTPUT -d 192.0.2.1/32 -p tcp -j REDIRECT --to-ports 9"
    lab.run(["iptables", "-t", "nat", *theirs.split()], check=True)
    DRIVER.install(as_pod(lab))
    DRIVER.remove(as_pod(lab))
    after = saved(lab)
    assert "REDIRECTOR" not in after
    assert theirs in lab.run(["iptables-save"]).stdout
    DRIVER.remove(as_pod(lab))
    assert saved(lab) == after


def test_remove_needs_no_namespace(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.touch()
    for gone in (tmp_path / "gone", plain):
        DRIVER.remove(Pod("gone", gone, tmp_path, Mode.IPTABLES))


@pytest.mark.usefixtures("path")
def test_open_connections_survive_every_change(peers: tuple[LabPod, LabPod]) -> None:
    first, second = peers
    pod = as_pod(first)
    wider = replace(pod, steering=Steering(include_inbound_ports=frozenset({80})))
    connections: list[tuple[socket, Verdict]] = []

    def open_all(outbound: Verdict, inbound: Verdict) -> None:
        for own, other in ips(first, second):
            for lab, destination, verdict in ((first, other, outbound), (second, own, inbound)):
                connection, arrived = connect(lab, destination)
                connections.append((connection, verdict))
                assert arrived.verdict == verdict

    def all_alive() -> None:
        for number, (connection, verdict) in enumerate(connections):
            text = f"{number} {verdict}".encode()
            assert probes.echo(connection, text) == text

    try:
        open_all(Verdict.DIRECT, Verdict.DIRECT)
        DRIVER.install(pod)
        all_alive()
        open_all(Verdict.OUTBOUND, Verdict.INBOUND)
        DRIVER.install(wider)
        all_alive()
        DRIVER.remove(wider)
        all_alive()
        open_all(Verdict.DIRECT, Verdict.DIRECT)
        DRIVER.install(pod)
        all_alive()
    finally:
        for connection, _ in connections:
            connection.close()


@pytest.mark.usefixtures("path")
def test_no_connection_fails_while_the_rules_come_and_go(peers: tuple[LabPod, LabPod]) -> None:
    first, second = peers
    pod = as_pod(first)
    met: Counter[tuple[str, Verdict]] = Counter()
    stop = threading.Event()

    def traffic(destination: str) -> None:
        while not stop.is_set():
            connection, arrived = probes.connect(probes.Call(ip_address(destination), 80))
            with connection:
                assert probes.echo(connection, b"x" * 100) == b"x" * 100
            met[destination, arrived.verdict] += 1

    def moved_on(before: Counter[tuple[str, Verdict]]) -> bool:
        """Every caller got through once more, or has failed and will say so."""
        destinations = {destination for destination, _ in met - before}
        return len(destinations) == len(jobs) or any(job.done() for job in running)

    jobs = [(first, second.ip), (first, second.ip6), (second, first.ip), (second, first.ip6)]
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(within, lab.netns, partial(traffic, to)) for lab, to in jobs]
        try:
            for _ in range(6):
                for change in (DRIVER.install, DRIVER.remove):
                    before = met.copy()
                    change(pod)
                    until(partial(moved_on, before))
        finally:
            stop.set()
        for job in running:
            job.result(timeout=probes.TIMEOUT)
    outbound = {(ip, verdict) for ip in (second.ip, second.ip6) for verdict in STEERED_OUT}
    inbound = {(ip, verdict) for ip in (first.ip, first.ip6) for verdict in STEERED_IN}
    assert met.keys() == outbound | inbound


@pytest.mark.usefixtures("path")
def test_remove_keeps_nat_only_while_redirected_connections_are_open(
    peers: tuple[LabPod, LabPod],
) -> None:
    first, second = peers
    pod = as_pod(first)
    DRIVER.install(pod)
    for destination in (second.ip, second.ip6):
        connection, arrived = connect(first, destination)
        with connection:
            assert arrived.verdict == Verdict.OUTBOUND
            DRIVER.remove(pod)
            assert saved(first).count(f"-A {KEEP_CHAIN}") == 1
            assert arrival(first, destination).verdict == Verdict.DIRECT
        until(lambda: not open_connections(first.netns, {15001}))
        DRIVER.remove(pod)
        assert "REDIRECTOR" not in saved(first)
        DRIVER.install(pod)
    DRIVER.remove(pod)
    assert "REDIRECTOR" not in saved(first)


def test_who_cannot_count_connections_keeps_them(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_sock_diag(*_: object) -> None:
        raise MachineError("the kernel does not list its TCP sockets")

    lab = node.pod("a")
    DRIVER.install(as_pod(lab))
    with monkeypatch.context() as patch:
        patch.setattr("redirector.modes.iptables.driver.open_connections", no_sock_diag)
        DRIVER.remove(as_pod(lab))
        assert saved(lab).count(f"-A {KEEP_CHAIN}") == 2
        assert saved(lab).count("REDIRECTOR_OUTPUT") == 0
    DRIVER.remove(as_pod(lab))
    assert "REDIRECTOR" not in saved(lab)


@pytest.mark.usefixtures("path")
def test_a_refused_rule_is_named_and_leaves_nothing(node: Node) -> None:
    lab = node.pod("a")
    with pytest.raises(DatapathError, match=rf"pod {lab.name}: .*70000"):
        DRIVER.install(as_pod(lab, Steering(outbound_port=70000)))
    assert "REDIRECTOR" not in saved(lab)


def break_ipv6(path: Path) -> None:
    program = path / "ip6tables-restore"
    program.unlink()
    program.write_text("#!/bin/sh\necho out of memory >&2\nexit 1\n")
    program.chmod(0o755)


def test_a_failure_half_way_leaves_nothing(node: Node, path: Path) -> None:
    lab = node.pod("a")
    break_ipv6(path)
    with pytest.raises(DatapathError, match="ip6tables-restore refused: out of memory"):
        DRIVER.install(as_pod(lab))
    assert "REDIRECTOR" not in saved(lab)


def test_a_failed_change_leaves_the_rules_as_they_were(node: Node, path: Path) -> None:
    lab = node.pod("a")
    DRIVER.install(as_pod(lab))
    before = saved(lab)
    break_ipv6(path)
    with pytest.raises(DatapathError, match="out of memory"):
        DRIVER.install(as_pod(lab, Steering(proxy_uids=(7,))))
    assert saved(lab) == before


@pytest.mark.usefixtures("path")
def test_missing_names_what_somebody_took_away(node: Node) -> None:
    lab = node.pod("a")
    pod = as_pod(lab)
    DRIVER.install(pod)
    lab.run(["iptables", "-t", "nat", "-D", "REDIRECTOR_OUTPUT", "2"], check=True)
    lab.run(["ip6tables", "-t", "nat", "-F", "PREROUTING"], check=True)
    lab.run(["ip6tables", "-t", "nat", "-A", "REDIRECTOR_INBOUND", "-j", "RETURN"], check=True)
    assert DRIVER.missing(pod) == [
        "IPv4 rule outbound.proxy-self in chain REDIRECTOR_OUTPUT",
        "IPv6 chain REDIRECTOR_INBOUND as it was installed: somebody added or moved rules",
        "IPv6 jump from chain PREROUTING of table nat",
    ]
    DRIVER.install(pod)
    assert DRIVER.missing(pod) == []


def test_a_namespace_that_is_gone_is_a_clear_error(tmp_path: Path) -> None:
    gone = Pod("gone", tmp_path / "gone", tmp_path, Mode.IPTABLES)
    with pytest.raises(InputError, match=rf"netns {gone.netns}: No such file .*; give a path"):
        DRIVER.install(gone)
    assert DRIVER.missing(gone) != []
