"""Whether a program may be attached to a cgroup without harm to those of others.

The kernel runs a program that was attached with BPF_F_ALLOW_OVERRIDE only where no cgroup below has
one of its own (compute_effective_progs in kernel/bpf/cgroup.c): ours would silently switch it off.
"""

import os
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.libbpf import AttachType
from redirector.errors import DatapathError


def require_room(what: str, kind: AttachType, cgroup: Path) -> None:
    """DatapathError, beginning with `what`, names the cgroup whose program leaves no room."""
    for place in (cgroup, *cgroup.parents):
        if not (place / "cgroup.procs").exists():
            return
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            programs, flags = libbpf.prog_query(fd, kind)
        finally:
            os.close(fd)
        if programs and flags & libbpf.BPF_F_ALLOW_MULTI:
            return
        if programs:
            raise DatapathError(
                f"{what}: another program is attached to {place} without BPF_F_ALLOW_MULTI, and "
                "would no longer run for this pod; have its owner attach it with that flag, or use "
                "--mode iptables"
            )
