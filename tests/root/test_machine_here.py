"""The machine that the tests run on, which set-up made ready."""

import io
import subprocess
import sys

import pytest

from redirector.check import run
from redirector.lab import Node
from redirector.machine import BPFFS, cgroup2_mount

pytestmark = pytest.mark.root

ENSURE = "from redirector.machine import *; print(bpffs_mount(), ensure_bpffs(), bpffs_mount())"


def test_this_machine_has_all_that_is_needed() -> None:
    out = io.StringIO()
    assert run(out) == 0, out.getvalue()
    # What a kernel does wrong with redirected bytes is for others to judge.
    lacking = [
        line for line in out.getvalue().splitlines() if not line.startswith(("ok ", "FAILED "))
    ]
    assert lacking == []


def test_a_container_sees_the_nodes_cgroups(node: Node) -> None:
    """In a cgroup namespace of its own the node's mount is not the one that begins at `/`."""
    mount = cgroup2_mount()
    script = f'echo $$ > {node.cgroup}/cgroup.procs; exec unshare --cgroup --mount "$@"'
    inner = 'd=$(mktemp -d); mount -t cgroup2 none $d; "$@"; umount $d; rmdir $d'
    look = "from redirector.machine import *; print(cgroup2_mount())"
    argv = ["sh", "-c", script, "sh", "sh", "-c", inner, "sh", sys.executable, "-c", look]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == str(mount), done.stderr


def test_bpffs_is_mounted_where_it_is_not() -> None:
    # In a mount namespace of its own, so that nobody else loses their pins.
    script = f'while umount {BPFFS} 2>/dev/null; do :; done; exec "$@"'
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", ENSURE]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["None", str(BPFFS), str(BPFFS)], done.stderr
