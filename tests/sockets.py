"""Sockets of a pod in the hands of the test: network namespace and cgroup are the pod's."""

import socket
from collections.abc import Iterable

from redirector.lab import LabPod


def pod_socket(
    pod: LabPod,
    *,
    sidecar: bool = False,
    uid: int | None = None,
    family: int = socket.AF_INET,
    options: Iterable[tuple[int, int, int]] = (),
) -> socket.socket:
    """A TCP socket made by a process of the pod, which owns it whoever connects it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def make_and_send() -> None:
        with socket.socket(family, socket.SOCK_STREAM) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for level, name, value in options:
                made.setsockopt(level, name, value)
            socket.send_fds(theirs, [b"s"], [made.fileno()])

    with ours, theirs:
        pod.call(make_and_send, sidecar=sidecar, uid=uid)
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    made = socket.socket(fileno=descriptors[0])
    made.settimeout(10)
    return made
