"""A real Envoy that is killed, started again, or replaced by a hot restart, in each way."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from mesh import WAYS, Mesh
from sidecars import Passthrough, start_sidecar
from waiting import eventually

from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import LabPod, Node
from redirector.lab.node import SIDECAR_ID

pytestmark = pytest.mark.root

PORT = 9000


@pytest.fixture
def mesh(node: Node, enrollment: Enrollment, datapath: Datapath) -> Mesh:
    return Mesh(node.pod("client"), node.pod("server"), enrollment, datapath)


def talk(mesh: Mesh, listener: socket.socket) -> None:
    """A new connection, through both sidecars, that carries a question and an answer."""
    with mesh.connect(PORT) as client:
        server, peer = listener.accept()
        with server:
            assert peer[0] == "127.0.0.6"
            _speak(client, server)


def _speak(client: socket.socket, server: socket.socket) -> None:
    for one, other in ((client, server), (server, client)):
        one.sendall(b"word")
        assert other.recv(4, socket.MSG_WAITALL) == b"word"


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_started_again(mesh: Mesh, tmp_path: Path, way: str) -> None:
    mesh.enroll(WAYS[way])
    sidecars = {pod: start_sidecar(pod, tmp_path) for pod in (mesh.client, mesh.server)}
    with mesh.listening(PORT) as listener:
        for pod in sidecars:
            with mesh.connect(PORT) as client:
                server, _ = listener.accept()
                with server:
                    _speak(client, server)
                    sidecars[pod].process.kill()
                    sidecars[pod].process.wait()
                    # Both applications are told, each by its own sidecar at the latest.
                    assert (client.recv(1), server.recv(1)) == (b"", b"")
            _nobody_comes(mesh, listener, outbound=pod is mesh.client)
            sidecars[pod] = start_sidecar(pod, tmp_path)
            talk(mesh, listener)


def _nobody_comes(mesh: Mesh, listener: socket.socket, *, outbound: bool) -> None:
    """Without the client's sidecar connect() fails; without the server's, its own one hangs up."""
    if outbound:
        with pytest.raises(ConnectionRefusedError):
            mesh.connect(PORT)
    else:
        with mesh.connect(PORT) as client:
            assert client.recv(1) == b""
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.settimeout(10)


@pytest.fixture
def ids(place: Path) -> Iterator[Path]:
    """A folder for the ids that hot restarts go by; what Envoy shares in memory goes with it."""
    path = place / "ids"
    path.mkdir()
    os.chown(path, SIDECAR_ID, SIDECAR_ID)
    yield path
    for file in path.iterdir():
        for shared in Path("/dev/shm").glob(f"envoy_shared_memory_{file.read_text().strip()}*"):
            shared.unlink()


@pytest.mark.parametrize("way", WAYS)
def test_hot_restart(mesh: Mesh, place: Path, ids: Path, way: str) -> None:
    """The new Envoy takes the listening sockets over, the old one drains and ends."""
    mesh.enroll(WAYS[way])

    def start(pod: LabPod, epoch: int) -> Passthrough:
        known = ids / pod.name
        if epoch == 0:
            which = ["--use-dynamic-base-id", "--base-id-path", str(known)]
        else:
            which = ["--base-id", known.read_text()]
        restarts = [*which, "--restart-epoch", str(epoch)]
        restarts += ["--drain-time-s", "1", "--parent-shutdown-time-s", "2"]
        sidecar = Passthrough(pod, place / f"{pod.name}.log", restarts)
        eventually("the sidecar's listeners", sidecar.listens)
        return sidecar

    pods = (mesh.client, mesh.server)
    old = [start(pod, 0) for pod in pods]
    with mesh.listening(PORT) as listener:
        talk(mesh, listener)
        new = [start(pod, 1) for pod in pods]
        while any(sidecar.process.poll() is None for sidecar in old):
            talk(mesh, listener)
        talk(mesh, listener)
    assert [sidecar.process.poll() for sidecar in new] == [None, None]
