"""Short-circuited connections in the hands of the test, and what is asked of their sockets."""

import array
import fcntl
import socket
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sockets import pod_socket

from redirector.datapath.layout import Counter
from redirector.datapath.pins import Datapath
from redirector.lab import LabPod
from redirector.network import netns_cookie

SERVICE = ("10.96.1.1", 80)
OUTBOUND = 15001
MIB = 1 << 20


class Pair:
    """Both ends of a steered connection, made in a pod's app and sidecar cgroups."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server


@contextmanager
def pair(
    pod: LabPod, *, defer_accept: bool = False, first: bytes = b"", source_port: int = 0
) -> Iterator[Pair]:
    """A connection from the app to a service, accepted by a listener in the sidecar's place.

    With `first`, the client has sent these bytes before the server accepts.
    """
    options = [(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)] if defer_accept else []
    listener = pod_socket(pod, sidecar=True, options=options)
    listener.bind(("0.0.0.0", OUTBOUND))
    listener.listen()
    client = pod_socket(pod)
    if source_port:
        client.bind((pod.ip, source_port))
    client.connect(SERVICE)
    for piece in (first[i : i + 4] for i in range(0, len(first), 4)):
        client.sendall(piece)
        time.sleep(0.02)
    server, _ = listener.accept()
    with client, server, listener:
        for end in (client, server):
            end.settimeout(10)
        yield Pair(client, server)


def counted(datapath: Datapath, pod: LabPod) -> dict[Counter, int]:
    return datapath.maps.counters(netns_cookie(pod.netns))


def receive(end: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        chunk = end.recv(size - len(got))
        if not chunk:
            break
        got += chunk
    return bytes(got)


def readable(end: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(end.fileno(), termios.FIONREAD, count)
    return count[0]
