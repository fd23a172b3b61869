"""Making, emptying and removing cgroup2 subtrees."""

import time
from pathlib import Path

from redirector.processes import processes


def remove_tree(top: Path, timeout: float = 10.0) -> None:
    """Kill every process in `top` and below, wait until they are gone, remove the directories.

    Does nothing when `top` is not there. Raises TimeoutError naming the pids that would not die.
    """
    if not top.exists():
        return
    (top / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + timeout
    while "populated 1" in (top / "cgroup.events").read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(f"cgroup {top}: processes {processes(top)} did not end when killed")
        time.sleep(0.002)
    for directory in sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True):
        directory.rmdir()
    top.rmdir()


def cpu_usec(cgroup: Path) -> int:
    """CPU time that the processes in and below `cgroup` used since it was made, in µs.

    Exited processes included. Source: Documentation/admin-guide/cgroup-v2.rst, cpu.stat; kept by
    the core, so that it is there without the cpu controller too.
    """
    for line in (cgroup / "cpu.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == "usage_usec":
            return int(value)
    raise ValueError(f"{cgroup}/cpu.stat: no usage_usec")
