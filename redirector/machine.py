"""What this machine offers: read from the kernel's own tables, never assumed."""

import ctypes
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from redirector.errors import MachineError

MOUNTINFO = Path("/proc/self/mountinfo")
STATE = Path("/var/lib/redirector")
BPFFS = Path("/sys/fs/bpf")
ENVOY_VARIABLE = "REDIRECTOR_ENVOY"
#: bcc reads this one itself.
HEADERS_VARIABLE = "BCC_KERNEL_SOURCE"
_MODULES = Path("/lib/modules")


def cgroup2_mount(mountinfo: Path = MOUNTINFO) -> Path:
    """Where the cgroup2 hierarchy is mounted (proc_pid_mountinfo(5)).

    On a hybrid machine it is not /sys/fs/cgroup. A mount of a subtree counts only when no mount
    shows more of the hierarchy: in a container, the node's own shows "/.." or the like as its root
    (cgroup_namespaces(7)). Raises MachineError when there is none.
    """
    found = _mounts("cgroup2", mountinfo)
    if not found:
        raise MachineError(
            "cgroup2 is not mounted on this machine; "
            "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified"
        )
    return min(found, key=lambda mount: (-mount[0].count("/.."), len(mount[0])))[1]


def bpffs_mount(mountinfo: Path = MOUNTINFO) -> Path | None:
    """Where a whole bpffs is mounted, /sys/fs/bpf before others; None when nowhere."""
    found = [path for root, path in _mounts("bpf", mountinfo) if root == "/"]
    return BPFFS if BPFFS in found else next(iter(found), None)


def ensure_bpffs() -> Path:
    """Return where bpffs is mounted; mount it at /sys/fs/bpf, for good, when it is nowhere.

    Pins live there until a reboot. Raises MachineError when it cannot be mounted.
    """
    mounted = bpffs_mount()
    if mounted is not None:
        return mounted
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", bytes(BPFFS), b"bpf", 0, None) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise MachineError(
            f"bpffs is not mounted and cannot be: {reason}; as root: mount -t bpf bpf {BPFFS}"
        )
    return BPFFS


def require_bpffs(path: Path, mountinfo: Path = MOUNTINFO) -> Path:
    """Return `path` if it lies below a mount of bpffs; MachineError otherwise."""
    if not any(mount in path.parents for _, mount in _mounts("bpf", mountinfo)):
        raise MachineError(
            f"{path}: is not below a bpffs, where pins can be; mount one: mount -t bpf bpf {BPFFS}"
        )
    return path


def require_root() -> None:
    """Raise MachineError unless this process is root."""
    if os.geteuid() != 0:
        raise MachineError(f"this needs root, not uid {os.geteuid()}; run it with sudo")


def envoy_binary(
    environment: Mapping[str, str] = os.environ, installed: Path = STATE / "envoy/envoy/_bin/envoy"
) -> Path:
    """Return Envoy's program: what REDIRECTOR_ENVOY names, else what set-up installed, else PATH's.

    Raises MachineError when there is none.
    """
    named = environment.get(ENVOY_VARIABLE)
    if named:
        if not _executable(Path(named)):
            raise MachineError(
                f"{ENVOY_VARIABLE}={named}: is not a program; name Envoy's or unset it"
            )
        return Path(named)
    if _executable(installed):
        return installed
    found = shutil.which("envoy", path=environment.get("PATH"))
    if found is None:
        raise MachineError(
            f"Envoy is not at {installed} nor on the PATH; run make setup, or set {ENVOY_VARIABLE}"
        )
    return Path(found)


def kernel_headers(
    environment: Mapping[str, str] = os.environ,
    merged: Path = STATE / "headers",
    modules: Path = _MODULES,
) -> Path:
    """Return the header tree for bcc: BCC_KERNEL_SOURCE, else set-up's, else the kernel's own.

    Any kernel's headers serve, because the programs read only UAPI contexts; but they must be one
    tree. Raises MachineError when there is none.
    """
    named = environment.get(HEADERS_VARIABLE)
    if named:
        if not _header_tree(Path(named)):
            raise MachineError(
                f"{HEADERS_VARIABLE}={named}: has no include/linux/kconfig.h;"
                " name a tree of kernel headers or unset it"
            )
        return Path(named)
    for tree in (merged, modules / os.uname().release / "build"):
        if _header_tree(tree):
            return tree
    raise MachineError(
        f"there are no kernel headers in {merged}; run make setup, or install"
        f" linux-headers-$(uname -r) and set {HEADERS_VARIABLE}"
    )


def find_tool(name: str, package: str) -> Path:
    """Return the path of a program; MachineError names the Debian package when there is none."""
    # sbin is not on the PATH of every root shell (su without a dash).
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    found = shutil.which(name, path=path)
    if found is None:
        raise MachineError(f"{name} is not installed; install it: apt-get install {package}")
    return Path(found)


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _header_tree(tree: Path) -> bool:
    # bcc includes this one first, for every program; half a Debian tree lacks it.
    return (tree / "include/linux/kconfig.h").is_file()


def _mounts(kind: str, mountinfo: Path) -> list[tuple[str, Path]]:
    """(root within the file system, mount point) of each mount of this kind."""
    found: list[tuple[str, Path]] = []
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == kind:
            fields = before.split()
            found.append((fields[3], Path(_unescape(fields[4]))))
    return found


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    return field.encode("latin-1", "backslashreplace").decode("unicode_escape")
