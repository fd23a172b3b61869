"""A pod's start is held until its connections are steered, and not a moment less."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from redirector.awaiting import DOCUMENTATION, Target, await_steering
from redirector.enrollment import Enrollment
from redirector.errors import MachineError
from redirector.lab import LabPod, Node
from redirector.model import Mode
from redirector.options import parse

pytestmark = pytest.mark.root

PATIENCE_S = 30


@contextmanager
def awaiting(pod: LabPod, *options: str, uid: int = 1000) -> Iterator["subprocess.Popen[str]"]:
    """`redirector await` in the pod, as any user."""
    # Its own Python and clone may be closed to other users; what it imports must be read by then.
    program = (
        "import os, sys; from redirector import awaiting, cli;"
        f"os.setresuid({uid}, {uid}, {uid}); sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "await", *options]
    child = pod.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()


def ended(child: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = child.communicate(timeout=PATIENCE_S)
    return child.returncode, out, err


def listens(pod: LabPod) -> bool:
    return "15001" in pod.run(["ss", "-Hltn"]).stdout


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("to", [[], ["--to", f"[{DOCUMENTATION[1]}]:443"]], ids=["v4", "v6"])
def test_it_holds_until_the_pod_is_steered(
    node: Node, enrollment: Enrollment, mode: Mode, to: list[str]
) -> None:
    pod = node.pod("pod")
    pod.run(["ip", "route", "replace", "default", "via", str(node.subnet[1])], check=True)
    with awaiting(pod, *to) as child:
        while not listens(pod):
            assert child.poll() is None, ended(child)
        time.sleep(1)
        assert child.poll() is None
        enrollment.enroll("pod", pod.netns, pod.cgroup, mode)
        code, out, err = ended(child)
        assert (code, err) == (0, ""), err
        assert out.startswith("steered after ")


def test_it_fails_in_time_and_says_what_to_look_at(node: Node) -> None:
    pod = node.pod("pod")
    with awaiting(pod, "--timeout", "0.5") as child:
        code, out, err = ended(child)
    assert (code, out) == (3, "")
    assert err.startswith("redirector: connections of this pod are not steered after 0.5 s (tried ")
    assert err.count("\n") == 1


def test_who_is_never_steered_is_not_let_through(node: Node, enrollment: Enrollment) -> None:
    """The sidecar's user is direct, and so is an excluded address."""
    pod = node.pod("pod")
    steering = parse({"excludeOutboundIPRanges": "198.51.100.0/24"})
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF, steering=steering)
    for options, uid in ((["--to", "198.51.100.1:80"], 1000), ([], 1337)):
        with awaiting(pod, "--timeout", "0.5", *options, uid=uid) as child:
            assert ended(child)[0] == 3


def test_a_stranger_who_answers_for_everything_proves_nothing(node: Node) -> None:
    """The first hop may take connections to any address, as another mesh of the node would."""
    pod, other = node.pod("pod"), node.pod("other")
    (route,) = json.loads(other.run(["ip", "-j", "addr", "show", "eth0"]).stdout)
    assert route
    other.run(["ip", "addr", "add", f"{DOCUMENTATION[0]}/32", "dev", "lo"], check=True)
    other.popen([sys.executable, "-m", "http.server", "80", "--bind", str(DOCUMENTATION[0])])
    pod.run(["ip", "route", "replace", f"{DOCUMENTATION[0]}/32", "via", other.ip], check=True)
    deadline = time.monotonic() + PATIENCE_S
    while f"{DOCUMENTATION[0]}:80" not in other.run(["ss", "-Hltn"]).stdout:
        assert time.monotonic() < deadline
    with pytest.raises(MachineError, match="are not steered after"):
        pod.call(await_steering, Target(DOCUMENTATION[0], 80), 15001, 1.5)


def test_a_sidecar_that_is_there_already_is_told_of(node: Node) -> None:
    pod = node.pod("pod")
    pod.popen([sys.executable, "-m", "http.server", "15001"])
    deadline = time.monotonic() + PATIENCE_S
    while not listens(pod):
        assert time.monotonic() < deadline
    with awaiting(pod) as child:
        code, _, err = ended(child)
    assert code == 3
    assert "port 15001: Address already in use; run this before the sidecar" in err


def test_wrong_options(capsys: pytest.CaptureFixture[Any]) -> None:
    from redirector.cli import main

    for wrong in ("10.0.0.1", "2001:db8::1:80", "[10.0.0.1]:80", "10.0.0.1:0", "x:80"):
        assert main(["await", "--to", wrong]) == 2
        assert f"--to {wrong}: " in capsys.readouterr().err
