"""Two pods with sidecars, each to be enrolled in one of the ways that traffic can take."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sockets import pod_socket
from waiting import PATIENCE_S

from redirector.datapath.layout import Counter
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod
from redirector.model import Accelerate, Mode
from redirector.network import netns_cookie

Way = tuple[Mode, Accelerate]
WAYS: dict[str, Way] = {
    "ebpf-accelerated": (Mode.EBPF, Accelerate.ON),
    "ebpf-steered": (Mode.EBPF, Accelerate.OFF),
    "iptables": (Mode.IPTABLES, Accelerate.AUTO),
}


@dataclass(frozen=True)
class Mesh:
    """Two pods with sidecars, and what enrols them."""

    client: LabPod
    server: LabPod
    enrollment: Enrollment
    datapath: Datapath

    def enroll(self, way: Way) -> None:
        for pod in (self.client, self.server):
            self.enrollment.enroll(pod.name, pod.netns, pod.cgroup, *way)

    def unenroll(self) -> None:
        for pod in (self.client, self.server):
            self.enrollment.unenroll(pod.name)

    def change_mode(self, mode: Mode) -> None:
        for pod in (self.client, self.server):
            self.enrollment.change_mode(pod.name, mode)

    def counters(self, pod: LabPod) -> dict[Counter, int]:
        return self.datapath.maps.counters(netns_cookie(pod.netns))

    def redirected(self) -> dict[tuple[str, str, int], tuple[int, int]]:
        """Open connections of both pods: who opened it, to where -> redirected bytes by side."""
        names = {netns_cookie(pod.netns): pod.name for pod in (self.client, self.server)}
        return {
            (
                names[found.flow.client_netns].rpartition("-")[2],
                str(found.key.server.ip()),
                found.key.server_port,
            ): (found.flow.bytes[0], found.flow.bytes[1])
            for found in self.datapath.maps.flows()
            if found.flow.client_netns in names
        }

    @contextmanager
    def listening(self, port: int) -> Iterator[socket.socket]:
        """A listening socket of the server's application."""
        with pod_socket(self.server) as listener:
            listener.bind(("0.0.0.0", port))
            listener.listen(128)
            yield listener

    def connect(self, port: int) -> socket.socket:
        """A connection of the client's application to the server's."""
        made = pod_socket(self.client)
        made.settimeout(PATIENCE_S)
        made.connect((self.server.ip, port))
        return made
