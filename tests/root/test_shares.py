"""However many connections a pod opens, others can open theirs, and every place is given back."""

import errno
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from sockets import pod_socket
from test_limits import connect_many, described, listen
from waiting import eventually

from redirector.datapath import libbpf
from redirector.datapath.layout import Counter, EventKind, Flow, FlowKey, Room
from redirector.datapath.pins import Datapath
from redirector.datapath.source import SIZES
from redirector.lab import LabPod, Node
from redirector.machine import ensure_bpffs
from redirector.modes.ebpf import EbpfMode
from redirector.network import netns_cookie

pytestmark = pytest.mark.root

FLOWS = 64
PODS = 4
#: Half of the map, divided by the pods.
FLOOR = 8
#: Of the other half, what is as much as it leaves.
MOST = 16


@pytest.fixture(scope="module")
def crowded() -> Iterator[Datapath]:
    datapath = Datapath(
        ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}", {**SIZES, "MAX_FLOWS": FLOWS}
    )
    yield datapath
    datapath.unload()


@pytest.fixture
def pods(node: Node, crowded: Datapath) -> Iterator[list[LabPod]]:
    """As many as divide the room, every place of which is free before and after."""
    made = [node.pod(f"pod{n}") for n in range(PODS)]
    for pod in made:
        EbpfMode(crowded).install(replace(described(pod), name=pod.name))
    assert crowded.maps.room(Room.FLOOR) == FLOOR
    yield made
    for pod in made:
        EbpfMode(crowded).remove(replace(described(pod), name=pod.name))
    assert taken(crowded) == (0, {}, 0)


def taken(datapath: Datapath) -> tuple[int, dict[int, int], int]:
    """Flows by all counts: of the node, of its pods, and the entries themselves."""
    held, _ = datapath.maps.fills()["flows"]
    return datapath.maps.room(Room.TAKEN), datapath.maps.shares(), held


def shares(datapath: Datapath, pods: list[LabPod]) -> list[int]:
    found = datapath.maps.shares()
    return [found[netns_cookie(pod.netns)] for pod in pods]


def opened(outcomes: list[socket.socket | int]) -> list[socket.socket]:
    """Those that were; all others must have been refused as the documentation says."""
    refused = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert refused == [errno.ECONNREFUSED] * len(refused)
    return [outcome for outcome in outcomes if not isinstance(outcome, int)]


def refusals(datapath: Datapath, pod: LabPod) -> dict[Counter, int]:
    found = datapath.maps.counters(netns_cookie(pod.netns))
    return {
        counter: count
        for counter, count in found.items()
        if count and counter.name.startswith(("REFUSED_", "PASSED_"))
    }


def test_a_pod_that_takes_all_that_it_can_get_leaves_room(
    crowded: Datapath, pods: list[LabPod]
) -> None:
    with ExitStack() as stack:
        followers = crowded.followers()
        assert followers is not None
        follower = stack.enter_context(followers.follow())
        for pod in pods:
            listen(pod, stack)
        for pod in pods:
            found = opened(connect_many(pod, MOST + 4, stack))
            # The first takes what it leaves to the others, and each of them its floor.
            assert len(found) == (MOST if pod is pods[0] else FLOOR)
        assert shares(crowded, pods) == [MOST, FLOOR, FLOOR, FLOOR]
        assert taken(crowded)[::2] == (MOST + 3 * FLOOR, MOST + 3 * FLOOR)
        assert refusals(crowded, pods[0]) == {Counter.REFUSED_NO_SHARE: 4}
        assert refusals(crowded, pods[1]) == {Counter.REFUSED_NO_SHARE: MOST + 4 - FLOOR}
        told = [event for batch in follower.read() for event in batch]
        refused = [event.reason for event in told if event.kind == EventKind.REFUSED]
        assert refused == [Counter.REFUSED_NO_SHARE] * (4 + 3 * (MOST + 4 - FLOOR))


def test_no_room_for_the_original_destination_refuses(
    crowded: Datapath, pods: list[LabPod]
) -> None:
    """Pods never fill the map together; what if it were full all the same."""
    left, strangers = 4, [FlowKey(netns=number) for number in range(1, FLOWS - 3)]
    with ExitStack() as stack:
        flows = stack.enter_context(libbpf.opened(crowded.generation.directory / "maps/flows"))
        for key in strangers:
            libbpf.map_update(flows, bytes(key), bytes(Flow(id=1)))
            stack.callback(libbpf.map_delete, flows, bytes(key))
        listen(pods[0], stack)
        assert len(opened(connect_many(pods[0], left + 3, stack))) == left
        assert refusals(crowded, pods[0]) == {Counter.REFUSED_NO_FLOW: 3}


def test_a_place_is_free_again_when_its_connection_ends(
    crowded: Datapath, pods: list[LabPod]
) -> None:
    with ExitStack() as stack:
        listener = listen(pods[0], stack)
        first, *others = opened(connect_many(pods[0], MOST + 1, stack))
        for _ in (first, *others):
            stack.enter_context(listener.accept()[0])
        assert not opened(connect_many(pods[0], 1, stack))
        first.close()
        eventually("the closed connection's place", lambda: shares(crowded, pods)[0] == MOST - 1)
        assert len(opened(connect_many(pods[0], 2, stack))) == 1


def test_half_open_connections_take_room_until_they_are_given_up(
    crowded: Datapath, pods: list[LabPod]
) -> None:
    with ExitStack() as stack, ExitStack() as waiting:
        listener = stack.enter_context(pod_socket(pods[0], sidecar=True))
        listener.bind(("0.0.0.0", 15001))
        listener.listen(0)  # one is established, the SYNs of the others get no answer
        for number in range(MOST):
            client = waiting.enter_context(pod_socket(pods[0]))
            client.setblocking(False)
            assert client.connect_ex(("198.51.100.7", 8000 + number)) == errno.EINPROGRESS
        assert not opened(connect_many(pods[0], 1, stack))
        listen(pods[1], stack)
        assert len(opened(connect_many(pods[1], FLOOR, stack))) == FLOOR
        waiting.close()
        eventually("their places", lambda: shares(crowded, pods)[0] == 0)


def test_what_can_do_without_leaves_half_to_what_cannot(
    crowded: Datapath, pods: list[LabPod]
) -> None:
    """The sidecar's own connections stay plain TCP, and the application's are steered."""
    with ExitStack() as stack:
        server = stack.enter_context(pod_socket(pods[1], sidecar=True))
        server.bind(("0.0.0.0", 15006))
        server.listen(64)
        for _ in range(MOST):
            client = stack.enter_context(pod_socket(pods[0], sidecar=True))
            client.connect((pods[1].ip, 8080))
            accepted = stack.enter_context(server.accept()[0])
            client.sendall(b"request")
            assert accepted.recv(16) == b"request"
        assert shares(crowded, pods)[0] == MOST / 2
        assert refusals(crowded, pods[0])[Counter.PASSED_NO_SHARE] == MOST / 2
        listen(pods[0], stack)
        assert len(opened(connect_many(pods[0], MOST, stack))) == MOST / 2


def test_what_a_pod_had_is_free_when_it_is_taken_off(crowded: Datapath, pods: list[LabPod]) -> None:
    with ExitStack() as stack:
        listen(pods[0], stack)
        found = opened(connect_many(pods[0], MOST, stack))
        leaving = replace(described(pods[0]), name=pods[0].name)
        EbpfMode(crowded).remove(leaving)
        assert taken(crowded)[::2] == (0, 0)
        EbpfMode(crowded).install(leaving)
        # The end of a connection that nobody knows any more gives nothing back.
        for client in found:
            client.close()
        assert shares(crowded, pods)[0] == 0
        assert len(opened(connect_many(pods[0], MOST + 1, stack))) == MOST
