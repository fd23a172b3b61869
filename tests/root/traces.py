"""What an enrolment leaves, looked for in the kernel itself and not through the product's eyes."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import xtables

from redirector.datapath.libbpf import AttachType
from redirector.lab import LabPod

_CGROUP_HOOKS = [kind for kind in AttachType if kind.name.startswith("CGROUP")]


def in_pod(pod: LabPod) -> list[str]:
    """The programs attached to a pod's cgroup and namespace, its chains and its sets."""
    found = [f"{kind.name} on the cgroup" for kind in _CGROUP_HOOKS if _attached(pod.cgroup, kind)]
    if _attached(pod.netns, AttachType.SK_LOOKUP):
        found.append("SK_LOOKUP on the namespace")
    for program in ("iptables-save", "ip6tables-save"):
        saved = pod.run([program], check=True).stdout
        found += [f"{program}: {line}" for line in saved.splitlines() if "REDIRECTOR" in line]
    found += [f"set {name}" for name in xtables.sets(pod) if name.startswith("redirector")]
    return found


def in_files(pins: Path, records: Path) -> list[str]:
    """The pins below or beside a place in bpffs, and the files of records."""
    return [
        *map(str, pins.parent.glob(f"{pins.name}*")),
        *map(str, _files(records)),
    ]


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def _attached(target: Path, kind: AttachType) -> int:
    """How many programs are attached (bpf_prog_query of libbpf)."""
    ids, count = (ctypes.c_uint32 * 16)(), ctypes.c_uint32(16)
    fd = os.open(target, os.O_RDONLY)
    try:
        libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
        failed = libbpf.bpf_prog_query(fd, int(kind), 0, None, ids, ctypes.byref(count))
        assert not failed, os.strerror(ctypes.get_errno())
    finally:
        os.close(fd)
    return count.value
