"""Full maps: what cannot be kept is refused or stays on TCP, and is counted. Nothing slips past."""

import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest
from sockets import pod_socket

from redirector.datapath.layout import Counter
from redirector.datapath.pins import Datapath
from redirector.datapath.source import SIZES
from redirector.errors import DatapathError
from redirector.lab import LabPod, Node
from redirector.machine import ensure_bpffs
from redirector.model import Accelerate, Mode, Pod, Steering
from redirector.modes.ebpf import EbpfMode
from redirector.network import addresses, netns_cookie

pytestmark = pytest.mark.root

OUTBOUND = 15001
SERVICE = ("10.96.1.1", 80)


@pytest.fixture
def small(node: Node, request: pytest.FixtureRequest) -> Iterator[tuple[Datapath, LabPod]]:
    """A pod on a datapath of its own, with maps as small as the test wants."""
    lab = node.pod("pod")
    root = ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}"
    datapath = Datapath(root, {**SIZES, **request.param})
    try:
        EbpfMode(datapath).install(described(lab))
        yield datapath, lab
    finally:
        datapath.unload()


def described(lab: LabPod) -> Pod:
    """The pod as a mode's driver is given it."""
    return Pod(
        "pod",
        lab.netns,
        lab.cgroup,
        Mode.EBPF,
        Accelerate.ON,
        addresses=addresses(lab.netns),
        netns_cookie=netns_cookie(lab.netns),
    )


def connect_many(pod: LabPod, count: int, stack: ExitStack) -> list[socket.socket | int]:
    """Connect `count` times to a service; a socket or an errno each. The sidecar accepts none."""
    outcomes: list[socket.socket | int] = []
    for _ in range(count):
        client = stack.enter_context(pod_socket(pod))
        try:
            client.connect(SERVICE)
            outcomes.append(client)
        except OSError as error:
            outcomes.append(error.errno or 0)
    return outcomes


def listen(pod: LabPod, stack: ExitStack) -> socket.socket:
    listener = stack.enter_context(pod_socket(pod, sidecar=True))
    listener.bind(("0.0.0.0", OUTBOUND))
    listener.listen(64)
    return listener


@pytest.mark.parametrize("small", [{"MAX_SOCKETS": 4}], indirect=True)
def test_no_room_in_the_sockhash_means_plain_tcp(small: tuple[Datapath, LabPod]) -> None:
    datapath, pod = small
    with ExitStack() as stack:
        listener = listen(pod, stack)
        clients = connect_many(pod, 6, stack)
        for n, client in enumerate(clients):
            assert not isinstance(client, int)
            server = stack.enter_context(listener.accept()[0])
            server.settimeout(5)
            client.sendall(b"ask%d" % n)
            assert server.recv(10) == b"ask%d" % n
            server.sendall(b"answer%d" % n)
            assert client.recv(10) == b"answer%d" % n
        counters = datapath.maps.counters(netns_cookie(pod.netns))
        assert counters[Counter.ACCELERATED] == 4
        assert counters[Counter.PASSED_FULL] == 8


def test_what_does_not_fit_leaves_no_trace(node: Node) -> None:
    """Enrolment is refused, the map named, and nothing stays of the pod, nor of its neighbour's."""
    one, two = node.pod("one"), node.pod("two")
    datapath = Datapath(
        ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}",
        {**SIZES, "MAX_PODS": 1, "MAX_ADDRESSES": 4, "MAX_CIDRS": 2, "MAX_MEMBERS": 8},
    )
    pod = described(one)
    many = tuple(IPv4Network(f"10.0.{n}.0/24") for n in range(3))
    addresses = (*pod.node_wide, *(IPv4Address(f"10.1.0.{n}") for n in range(4)))
    try:
        for name, unfit in (
            ("cidrs", replace(pod, steering=Steering(exclude_outbound_cidrs=many))),
            (
                "members",
                replace(pod, steering=Steering(exclude_outbound_ports=frozenset(range(9)))),
            ),
            ("pods_by_address", replace(pod, addresses=addresses)),
        ):
            with pytest.raises(DatapathError, match=rf"map {name}: .*full"):
                EbpfMode(datapath).install(unfit)
            assert entries(datapath) == {}, name
            assert datapath.pods() == []
        EbpfMode(datapath).install(pod)
        held = entries(datapath)
        with pytest.raises(DatapathError, match=r"map (counters|pods): .*full"):
            EbpfMode(datapath).install(replace(described(two), name="two"))
        assert entries(datapath) == held
        assert datapath.pods() == ["pod"]
    finally:
        datapath.unload()


def entries(datapath: Datapath) -> dict[str, int]:
    """How many entries the maps hold that hold any."""
    return {name: held for name, (held, _) in datapath.maps.fills().items() if held}
