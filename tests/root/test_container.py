"""The datapath is loaded and used from a container as the agent's manifest describes it."""

import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import probes
import pytest
from deployed import AGENT

from redirector.datapath.pins import Datapath
from redirector.lab import Node
from redirector.machine import ensure_bpffs
from redirector.model import Mode
from redirector.steering import Verdict

pytestmark = pytest.mark.root

#: A read-only root, namespaces of its own but for pids, and no more capabilities than granted.
CONTAINER = """
set -e
mount --make-rprivate /
mount --rbind / $ROOT
mount -o remount,bind,ro $ROOT
mount -t tmpfs none $ROOT/tmp
mkdir -p $ROOT$STATE
mount --bind $STATE $ROOT$STATE
ip link set lo up
exec chroot $ROOT setpriv --bounding-set=-all,$KEPT "$@"
"""


@pytest.mark.parametrize("mode", list(Mode))
def test_pods_are_enrolled_from_a_container(node: Node, tmp_path: Path, mode: Mode) -> None:
    spec = AGENT.pod()
    assert spec["hostPID"]
    assert "hostNetwork" not in spec
    assert AGENT.container()["securityContext"]["readOnlyRootFilesystem"]
    pod, peer = node.pod("pod"), node.pod("peer")
    probes.start(pod, [(Verdict.OUTBOUND, 15001)], sidecar=True)
    probes.start(peer, [(Verdict.DIRECT, 80)])
    process = pod.popen(["sleep", "1000"])
    pins = ensure_bpffs() / f"{node.name}-container"
    state, root = tmp_path / "state", tmp_path / "root"
    state.mkdir()
    root.mkdir()
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "REDIRECTOR_STATE": str(state),
        "REDIRECTOR_PINS": str(pins),
        "ROOT": str(root),
        "STATE": str(state),
        "KEPT": ",".join(f"+{name.lower()}" for name in AGENT.capabilities()),
    }

    def command(*words: str | Path) -> None:
        argv = ["unshare", "--mount", "--net", "--cgroup", "--ipc", "--uts"]
        argv += ["sh", "-c", CONTAINER, "sh", sys.executable, "-P", "-m", "redirector.cli"]
        done = subprocess.run(
            [*argv, *words], env=environment, capture_output=True, text=True, timeout=60, cwd="/"
        )
        assert (done.returncode, done.stderr) == (0, "")

    def verdict() -> Verdict:
        (arrival,) = pod.call(probes.dial, [probes.Call(ip_address(peer.ip), 80)])
        return Verdict(arrival.verdict)

    try:
        netns = f"/proc/{process.pid}/ns/net"
        command("enroll", "p", "--netns", netns, "--cgroup", pod.cgroup, "--mode", mode)
        assert verdict() is Verdict.OUTBOUND
        command("status")
        command("uninstall")
        assert verdict() is Verdict.DIRECT
    finally:
        Datapath(pins).unload()
