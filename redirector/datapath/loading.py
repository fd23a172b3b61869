"""Runs the loader (loader.py) in its short-lived process, from where bcc is not."""

import os
import subprocess
import sys
from collections.abc import Collection

from redirector.datapath.layout import SELF_TEST, Defect
from redirector.errors import DatapathError, MachineError
from redirector.machine import kernel_headers


def run_loader(*arguments: str, inherited: Collection[int] = ()) -> str:
    """What the loader prints. `inherited` are descriptors that it keeps open.

    Raises MachineError without bcc, DatapathError with what compiler or kernel refused.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "redirector.datapath.loader", *arguments],
        env={**os.environ, "BCC_KERNEL_SOURCE": str(kernel_headers())},
        capture_output=True,
        text=True,
        pass_fds=inherited,
    )
    if done.returncode == 0:
        return done.stdout
    if "No module named 'bcc'" in done.stderr:
        raise MachineError(
            f"{sys.executable} has no bcc; use Debian's Python with python3-bpfcc: "
            "/usr/bin/python3 -m venv --system-site-packages"
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines[-1:]
    raise DatapathError(
        f"the kernel or compiler refused the programs: {'; '.join(told[-3:])}; "
        "see: redirector check"
    )


def run_self_test() -> Defect:
    """What the running kernel does wrong with redirected bytes, limits included; pins nothing."""
    return Defect(int(run_loader(SELF_TEST)))
