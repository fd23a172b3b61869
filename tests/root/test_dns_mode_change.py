"""A pod that asks for names all the time changes modes: each question is answered, and by whom."""

import ctypes
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import probes
import pytest
import traces
from traffic import Phase, Traffic, flow, working

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.model import IPAddress, Mode, Steering
from redirector.steering import Verdict

pytestmark = pytest.mark.root

DNS_PORT = 53
#: Of a group that is not captured.
OUTSIDER = 7


def datagrams(address: IPAddress) -> socket.socket:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    return socket.socket(family, socket.SOCK_DGRAM)


def over_tcp(address: IPAddress) -> probes.Arrival:
    connection, arrival = probes.connect(probes.Call(address, DNS_PORT))
    with connection:
        assert probes.echo(connection, b"who?") == b"who?"
    return arrival


def once(address: IPAddress) -> probes.Arrival:
    with datagrams(address) as one:
        return probes.ask(one, address, DNS_PORT)


@contextmanager
def asker(
    pod: LabPod,
    resolvers: list[IPAddress],
    allowed: dict[Phase, set[Verdict]],
    moment: Any,
    gid: int,
) -> Iterator[Traffic]:
    """Ask in three ways: over TCP, from a socket for one question, and from one kept for all."""

    def questions() -> Iterator[None]:
        kept = {address: datagrams(address) for address in resolvers}
        ways: list[Callable[[IPAddress], probes.Arrival]] = [
            over_tcp,
            once,
            lambda address: probes.ask(kept[address], address, DNS_PORT),
        ]
        while True:
            for address in resolvers:
                for number, way in enumerate(ways):
                    before = moment.value
                    story = f"{address}, way {number}, from moment {before >> 2}"
                    try:
                        arrival = way(address)
                    except TimeoutError:
                        # A change may cost a question its answer: who asks asks again, and anew.
                        assert moment.value != before, f"no answer to {story}"
                        kept[address].close()
                        kept[address] = datagrams(address)
                        continue
                    story = f"{arrival} of {story} to {moment.value >> 2}"
                    assert (arrival.destination, arrival.port) == (address, DNS_PORT), story
                    if moment.value == before:
                        assert arrival.verdict in allowed[Phase(before & 3)], story
            yield

    with working(pod, questions, gid) as made:
        yield made


def test_modes_change_while_names_are_asked_for(
    node: Node, enrollment: Enrollment, datapath: Datapath
) -> None:
    """none -> ebpf -> iptables -> ebpf -> iptables -> none."""
    datapath.ensure()
    pod, resolver = node.pod("pod"), node.pod("resolver")
    probes.start(pod, [(Verdict.OUTBOUND, 15001), (Verdict.DNS, 15053)], sidecar=True)
    for each in (pod, resolver):
        probes.start(each, [(Verdict.DIRECT, DNS_PORT)])
    resolvers = [ip_address(resolver.ip), ip_address(resolver.ip6)]
    steering = Steering(
        dns_capture=True, dns_servers=tuple(resolvers), exclude_owner_groups=frozenset({OUTSIDER})
    )
    moment = multiprocessing.get_context("fork").Value(ctypes.c_uint64)
    direct, dns = {Verdict.DIRECT}, {Verdict.DNS}
    captured = {Phase.FREE: direct, Phase.CHANGING: direct | dns, Phase.ENROLLED: dns}

    def enter(phase: Phase) -> None:
        moment.value = ((moment.value >> 2) + 1) << 2 | phase

    with (
        asker(pod, resolvers, captured, moment, gid=0) as insider,
        asker(pod, resolvers, dict.fromkeys(Phase, direct), moment, gid=OUTSIDER) as outsider,
    ):

        def ask_on() -> None:
            """Until each has asked everybody in every way, twice."""
            flow(insider, outsider, rounds=2)

        ask_on()
        enter(Phase.CHANGING)
        enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, steering=steering)
        enter(Phase.ENROLLED)
        ask_on()
        for mode in (Mode.IPTABLES, Mode.EBPF, Mode.IPTABLES):
            enrollment.change_mode("pod", mode)
            enter(Phase.ENROLLED)
            ask_on()
        enter(Phase.CHANGING)
        enrollment.unenroll("pod")
        enter(Phase.FREE)
        ask_on()
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.IPTABLES, steering=steering)
    enrollment.unenroll("pod")
    assert traces.in_pod(pod) == []
