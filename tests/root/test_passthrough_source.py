"""::6 on the pod's lo, from which a sidecar calls its application over IPv6."""

from ipaddress import IPv6Address
from pathlib import Path

import pytest
import traces
from pyroute2 import IPRoute
from sockets import pod_socket

from redirector.enrollment import Enrollment
from redirector.errors import InputError
from redirector.lab import LabPod, Node
from redirector.model import Mode
from redirector.network import addresses, within

pytestmark = pytest.mark.root


def on_loopback(netns: Path) -> set[str]:
    def get() -> set[str]:
        with IPRoute() as ipr:
            return {message.get_attr("IFA_ADDRESS") for message in ipr.get_addr(index=1)}

    return within(netns, get)


@pytest.fixture
def pod(node: Node) -> LabPod:
    return node.pod("pod")


@pytest.mark.parametrize("mode", list(Mode))
def test_it_comes_and_goes_with_the_enrolment(
    pod: LabPod, enrollment: Enrollment, mode: Mode
) -> None:
    enrollment.enroll("pod", pod.netns, pod.cgroup, mode)
    assert "::6" in on_loopback(pod.netns)
    assert IPv6Address("::6") not in addresses(pod.netns)
    enrollment.unenroll("pod")
    assert "::6" not in on_loopback(pod.netns)


def test_where_loopback_has_no_ipv6_the_pod_is_refused(pod: LabPod, enrollment: Enrollment) -> None:
    pod.run(["sysctl", "-q", "net.ipv6.conf.lo.disable_ipv6=1"], check=True)
    with pytest.raises(InputError, match="lo takes no IPv6 address"):
        enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
    assert enrollment.pods() == traces.in_pod(pod) == []


def test_it_stays_while_a_connection_uses_it(pod: LabPod, enrollment: Enrollment) -> None:
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.IPTABLES)
    with pod_socket(pod, family=10) as listener, pod_socket(pod, family=10) as client:
        listener.bind((pod.ip6, 8080))
        listener.listen()
        client.bind(("::6", 0))
        client.connect((pod.ip6, 8080))
        server, _ = listener.accept()
        with server:
            server.settimeout(5)
            enrollment.unenroll("pod")
            client.sendall(b"still here")
            assert server.recv(20) == b"still here"
