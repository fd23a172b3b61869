"""A sidecar that is slow to take what was steered to it, while its pod leaves eBPF mode."""

import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import probes
import pytest
from sockets import pod_socket

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod
from redirector.model import Mode
from redirector.modes import ebpf
from redirector.records import Records

pytestmark = pytest.mark.root

SERVICE = ("10.96.1.1", 8080)
LEAVING: dict[str, Callable[[Enrollment], object]] = {
    "mode": lambda enrollment: enrollment.change_mode("pod", Mode.IPTABLES),
    "unenroll": lambda enrollment: enrollment.unenroll("pod"),
}


@contextmanager
def steered(pod: LabPod) -> Iterator[socket.socket]:
    """The sidecar's listener, with a connection in its backlog."""
    with pod_socket(pod, sidecar=True) as listener, pod_socket(pod) as client:
        listener.bind(("0.0.0.0", 15001))
        listener.listen()
        client.connect(SERVICE)
        yield listener


def original_port(accepted: socket.socket) -> int:
    raw = accepted.getsockopt(socket.SOL_IP, probes.SO_ORIGINAL_DST, 16)
    return int(struct.unpack_from("!H", raw, 2)[0])


@pytest.mark.parametrize("leave", LEAVING)
def test_what_it_takes_late_has_its_original_destination(
    enrollment: Enrollment, pod: LabPod, leave: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebpf, "DRAIN_SECONDS", 60.0)
    with ThreadPoolExecutor(1) as other, steered(pod) as listener:
        leaving = other.submit(LEAVING[leave], enrollment)
        time.sleep(1.2)
        assert not leaving.done()
        accepted, _ = listener.accept()
        with accepted:
            assert original_port(accepted) == SERVICE[1]
            leaving.result(timeout=20)


@pytest.mark.usefixtures("enrollment")
@pytest.mark.parametrize("leave", LEAVING)
def test_one_that_hangs_holds_nobody_up_and_is_told_of(
    datapath: Datapath,
    pod: LabPod,
    leave: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ebpf, "DRAIN_SECONDS", 0.3)
    told: list[str] = []
    telling = Enrollment(Records(tmp_path / "pods"), datapath, told.append)
    with steered(pod):
        LEAVING[leave](telling)
    (line,) = told
    assert line.startswith("pod pod: its sidecar has not taken 1 of the connections")
