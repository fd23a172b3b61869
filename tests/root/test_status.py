"""What status and metrics tell of connections that were really made, in either mode."""

from ipaddress import ip_address
from pathlib import Path

import accelerated
import probes
import pytest
from prometheus_client.parser import text_string_to_metric_families
from waiting import eventually

from redirector.datapath.layout import ConnectKind, Counter
from redirector.datapath.maps import Maps, Moved
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.metrics import render
from redirector.model import Accelerate, Mode
from redirector.network import netns_cookie
from redirector.options import parse
from redirector.records import Records
from redirector.status import Outcome, PodStatus
from redirector.steering import Verdict

pytestmark = pytest.mark.root

SERVICE = probes.Call(ip_address("10.96.1.1"), 80)
SERVICE6 = probes.Call(ip_address("fd96::1"), 80)
EXCLUDED = 9999


@pytest.fixture
def steered(node: Node) -> LabPod:
    pod = node.pod("pod")
    probes.start(pod, [(Verdict.OUTBOUND, 15001), (Verdict.INBOUND, 15006)], sidecar=True)
    return pod


def told(enrollment: Enrollment) -> PodStatus:
    (pod,) = enrollment.node_status().pods
    return pod


def counted(pod: PodStatus) -> dict[tuple[Outcome, str], int]:
    return {(tally.outcome, tally.reason): tally.count for tally in pod.tallies if tally.count}


@pytest.mark.parametrize("mode", list(Mode))
def test_connections_are_counted_by_what_became_of_them(
    node: Node, enrollment: Enrollment, steered: LabPod, mode: Mode
) -> None:
    outside = node.pod("outside")
    enrollment.enroll("pod", steered.netns, steered.cgroup, mode)
    own = probes.Call(ip_address(steered.ip), 8080)
    assert len(steered.call(probes.dial, [SERVICE] * 3 + [SERVICE6] * 2)) == 5
    steered.call(probes.dial, [own], sidecar=True)
    outside.call(probes.dial, [own] * 4)
    steered.call(probes.dial, [SERVICE] * 2, sidecar=True)
    found = counted(told(enrollment))
    steered_ones = {reason: n for (what, reason), n in found.items() if what is Outcome.STEERED}
    assert steered_ones == {"outbound": 5, "self": 1, "inbound": 4}
    direct_ones = {reason: n for (what, reason), n in found.items() if what is Outcome.DIRECT}
    assert direct_ones == {"outbound.proxy-uid": 2}


@pytest.mark.parametrize("before", [True, False])
def test_what_was_redirected_is_never_told_as_less(
    enrollment: Enrollment, node: Node, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Also when a connection closes while its bytes are being read."""
    pod = node.pod("pod")
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, Accelerate.ON)

    def redirected() -> int:
        return told(enrollment).counters[Counter.REDIRECTED_BYTES]

    with accelerated.pair(pod) as pair, monkeypatch.context() as patched:
        for end, other in ((pair.client, pair.server), (pair.server, pair.client)):
            end.sendall(bytes(5000))
            accelerated.receive(other, 5000)
        assert redirected() == 10_000
        moved = Maps.moved

        def close_meanwhile(maps: Maps) -> Moved:
            found = {} if before else moved(maps)
            pair.client.close()
            pair.server.close()
            eventually("the close", lambda: not maps.flows_of(netns_cookie(pod.netns)))
            return moved(maps) if before else found

        patched.setattr(Maps, "moved", close_meanwhile)
        assert redirected() == 10_000
    assert redirected() == 10_000
    # Begun anew it is less.
    enrollment.unenroll("pod")
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, Accelerate.ON)
    assert redirected() == 0


def test_every_pod_and_map_is_in_the_metrics(
    node: Node, enrollment: Enrollment, steered: LabPod
) -> None:
    enrollment.enroll("shop/a", steered.netns, steered.cgroup, Mode.EBPF)
    other = node.pod("other")
    enrollment.enroll("shop/b", other.netns, other.cgroup, Mode.IPTABLES)
    steered.call(probes.dial, [SERVICE] * 3)
    text = b"".join(render(enrollment.node_status())).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    connections = {
        (s.labels["pod"], s.labels["verdict"], s.labels["reason"]): s.value
        for s in families["redirector_connections"].samples
    }
    assert connections["a", "steered", "outbound"] == 3
    assert connections["b", "steered", "outbound"] == 0
    entries = {s.labels["map"]: s.value for s in families["redirector_map_entries"].samples}
    room = {s.labels["map"]: s.value for s in families["redirector_map_max_entries"].samples}
    assert entries["pods"] == 1
    assert entries["pods_by_address"] == len(enrollment.get("shop/a").node_wide)
    assert all(0 <= entries[name] < room[name] for name in room)


def test_how_long_connect_took_is_counted_by_what_became_of_it(
    node: Node, enrollment: Enrollment, steered: LabPod
) -> None:
    outside = node.pod("outside")
    probes.start(outside, [(Verdict.DIRECT, EXCLUDED)])
    steering = parse({"excludeOutboundPorts": str(EXCLUDED)})
    enrollment.enroll("pod", steered.netns, steered.cgroup, Mode.EBPF, steering=steering)
    steered.call(probes.dial, [SERVICE] * 5)
    steered.call(probes.dial, [probes.Call(ip_address(outside.ip), EXCLUDED)] * 3)
    latencies = told(enrollment).latencies
    assert {kind: latency.count for kind, latency in latencies.items()} == {
        ConnectKind.STEERED: 5,
        ConnectKind.DIRECT: 3,
    }
    for latency in latencies.values():
        # The last bucket has no bound; loopback and veth answer within the others.
        assert latency.buckets[-1] == 0
        assert 0 < latency.seconds < latency.count * 16.8


def test_nothing_loaded_is_nothing_to_tell(node: Node, tmp_path: Path) -> None:  # noqa: ARG001
    enrollment = Enrollment(Records(tmp_path / "pods"), Datapath(tmp_path / "pins"))
    assert b"redirector_build_info" in b"".join(render(enrollment.node_status()))
