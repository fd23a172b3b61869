"""Programs that stream: ssh (whose server speaks first), gRPC, iperf3, netcat."""

import json
import sys
from pathlib import Path
from subprocess import Popen

import pytest
from mesh import Mesh
from programs import MB, USER, Route, noise, own_folder, program, serve, sha256
from waiting import eventually

from redirector.datapath.listeners import listening_sockets
from redirector.lab import LabPod

pytestmark = pytest.mark.root

SSH, GRPC, IPERF, NETCAT = 2222, 50051, 5201, 7000
SIZE = 16 * MB
HERE = Path(__file__).parent

# Without PAM it would ask the shadow file, which its user cannot read, whether it is locked out.
_SSHD = """
Port {port}
HostKey {root}/host
AuthorizedKeysFile {root}/key.pub
PidFile none
StrictModes no
UsePAM yes
Subsystem sftp internal-sftp
"""


@pytest.fixture(scope="module")
def sshd(pods: Mesh, folder: Path) -> Path:
    """A folder that its user may write to; the user's key is in it."""
    root = own_folder(folder / "sshd")
    for name in ("host", "key"):
        argv = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", root / name]
        pods.server.run(argv, uid=USER, gid=USER, check=True)
    config = root / "sshd_config"
    config.write_text(_SSHD.format(root=root, port=SSH))
    argv = [program("sshd"), "-D", "-e", "-f", config]
    serve(pods.server, argv, folder / "sshd.log", SSH)
    return root


@pytest.fixture(scope="module")
def grpc(pods: Mesh, folder: Path) -> None:
    argv: list[str | Path] = [sys.executable, HERE / "grpc_stream.py", "serve", str(GRPC)]
    # Root, because the clone may be where nobody else can read it.
    serve(pods.server, argv, folder / "grpc.log", GRPC, uid=0)


@pytest.fixture(scope="module")
def iperf(pods: Mesh, folder: Path) -> None:
    argv = [program("iperf3"), "-s", "-p", str(IPERF)]
    # It writes a file in between.
    environment = {"TMPDIR": str(own_folder(folder / "iperf"))}
    serve(pods.server, argv, folder / "iperf.log", IPERF, env=environment)


def test_scp_both_ways(route: Route, sshd: Path) -> None:
    source = noise(route.folder / "scp-up", SIZE, 5)
    there, back = sshd / "uploaded", route.folder / "scp-back"
    there.unlink(missing_ok=True)
    argv = [program("scp"), "-q", "-F", "none", "-P", str(SSH), "-i", sshd / "key", "-B"]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    remote = f"nobody@{route.server.ip}:{there}"
    with route.carries(2 * SIZE, connections=2):
        route.client.run([*argv, source, remote], check=True)
        route.client.run([*argv, remote, back], check=True)
    assert sha256(source) == sha256(there) == sha256(back)


@pytest.mark.usefixtures("grpc")
@pytest.mark.parametrize(("messages", "size"), [(300, 65536), (1000, 100)])
def test_grpc_streams_both_ways(route: Route, messages: int, size: int) -> None:
    argv = [sys.executable, HERE / "grpc_stream.py", "chat", f"{route.server.ip}:{GRPC}"]
    with route.carries(messages * size):
        done = route.client.run([*argv, str(messages), str(size)], timeout=90)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("iperf")
@pytest.mark.parametrize(
    "options",
    [[], ["-R"], ["--bidir"], ["-P", "4"], ["-Z"], ["-l", "1000"]],
    ids=lambda options: " ".join(options) or "plain",
)
def test_iperf3(route: Route, options: list[str]) -> None:
    argv = [program("iperf3"), "-c", route.server.ip, "-p", str(IPERF), "-J", "-n", "64M"]
    # Nobody waits for what is on its way when the last byte is sent: some MB on each connection.
    with route.carries(MB, connections=2):
        told = json.loads(route.client.run([*argv, *options]).stdout)
        assert "error" not in told, told["error"]
    sums = [part for name, part in told["end"].items() if name.startswith("sum_sent")]
    assert max(part["bytes"] for part in sums) >= 64 << 20


@pytest.mark.parametrize("up", [True, False])
def test_netcat_to_the_end(route: Route, up: bool) -> None:
    """One side sends a file and closes its half; the other reads to the end."""
    sender = route.client if up else route.server
    file, got = noise(route.folder / "netcat", SIZE, int(up)), route.folder / "netcat-got"

    def netcat(pod: LabPod, *arguments: str) -> Popen[bytes]:
        sends = pod is sender
        argv = [program("nc"), *(["-N"] if sends else ["-d"]), *arguments]
        with file.open() as question, got.open("ab") as answer:
            return pod.popen(
                argv, stdin=question if sends else None, stdout=None if sends else answer
            )

    def listens() -> bool:
        with listening_sockets(route.server.netns, route.server.app, NETCAT) as found:
            return bool(found)

    got.unlink(missing_ok=True)
    server = netcat(route.server, "-l", str(NETCAT))
    eventually("netcat listening", listens)
    with route.carries(SIZE):
        client = netcat(route.client, route.server.ip, str(NETCAT))
        assert (client.wait(30), server.wait(30)) == (0, 0)
    assert got.stat().st_size == SIZE
    assert sha256(got) == sha256(file)
