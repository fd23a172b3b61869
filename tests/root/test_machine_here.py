"""The machine that the tests run on, which set-up made ready."""

import io
import subprocess
import sys

import pytest

from redirector.check import run
from redirector.machine import BPFFS

pytestmark = pytest.mark.root

ENSURE = "from redirector.machine import *; print(bpffs_mount(), ensure_bpffs(), bpffs_mount())"


def test_this_machine_has_all_that_is_needed() -> None:
    out = io.StringIO()
    assert run(out) == 0, out.getvalue()
    assert "\nwarn " not in out.getvalue()


def test_bpffs_is_mounted_where_it_is_not() -> None:
    # In a mount namespace of its own, so that nobody else loses their pins.
    script = f'while umount {BPFFS} 2>/dev/null; do :; done; exec "$@"'
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", ENSURE]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["None", str(BPFFS), str(BPFFS)], done.stderr
