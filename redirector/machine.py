"""What this machine offers: read from the kernel's own tables, never assumed."""

import os
import shutil
from pathlib import Path

from redirector.errors import MachineError

MOUNTINFO = Path("/proc/self/mountinfo")


def cgroup2_mount(mountinfo: Path = MOUNTINFO) -> Path:
    """Where the cgroup2 hierarchy is mounted (proc_pid_mountinfo(5)).

    On a hybrid machine it is not /sys/fs/cgroup. A mount of a subtree counts only when no mount
    shows more of the hierarchy. Raises MachineError when there is none.
    """
    found: list[tuple[str, Path]] = []
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            fields = before.split()
            found.append((fields[3], Path(_unescape(fields[4]))))
    if not found:
        raise MachineError(
            "cgroup2 is not mounted on this machine; "
            "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified"
        )
    return min(found, key=lambda mount: len(mount[0]))[1]


def find_tool(name: str, package: str) -> Path:
    """Return the path of a program; MachineError names the Debian package when there is none."""
    # sbin is not on the PATH of every root shell (su without a dash).
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    found = shutil.which(name, path=path)
    if found is None:
        raise MachineError(f"{name} is not installed; install it: apt-get install {package}")
    return Path(found)


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    return field.encode("latin-1", "backslashreplace").decode("unicode_escape")
