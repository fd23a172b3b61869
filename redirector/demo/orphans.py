"""What a killed demo left behind: SIGKILL leaves no time to clean up, so the next one does it."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pyroute2 import netns

from redirector import machine
from redirector.datapath.pins import Datapath
from redirector.lab import cgroups
from redirector.lab.node import NETNS_DIRECTORY

#: A demo's own directory is RUN/NAME; every user can read it: sidecars do not run as root.
RUN = Path("/run")
_OWNER = "owner"


@dataclass(frozen=True)
class Process:
    """A process by its id, which alone may be used again, and the time of its start."""

    pid: int
    started: str


def running(pid: int) -> Process | None:
    """The process of this id, if there is one."""
    try:
        # The name, in parentheses, may hold spaces; start time is field 22 of proc_pid_stat(5).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, fields[19])


def claim(directory: Path) -> None:
    """Note that the demo of this directory is this process."""
    (directory / _OWNER).write_text(json.dumps(asdict(_self())))


def _self() -> Process:
    found = running(os.getpid())
    assert found is not None
    return found


def sweep(prefix: str) -> list[str]:
    """Remove what demos left whose process is gone; their names. Others are left alone."""
    swept = []
    for directory in sorted(RUN.glob(f"{prefix}-*")):
        # Not written yet, or swept by another demo meanwhile: not ours to remove.
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            owner = Process(**json.loads((directory / _OWNER).read_text()))
            if running(owner.pid) != owner:
                _remove(directory)
                swept.append(directory.name)
    return swept


def _remove(directory: Path) -> None:
    name = directory.name
    cgroups.remove_tree(machine.cgroup2_mount() / name)
    Datapath(machine.ensure_bpffs() / name).unload()
    for namespace in (name, *(path.name for path in NETNS_DIRECTORY.glob(f"{name}-*"))):
        with contextlib.suppress(FileNotFoundError):
            netns.remove(namespace)
    # Last: it is what the next sweep would find if this one were killed.
    shutil.rmtree(directory, ignore_errors=True)
