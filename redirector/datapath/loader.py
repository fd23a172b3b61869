"""Compiles and loads the datapath, pins it, ends. The only importer of bcc.

Runs as `python -m redirector.datapath.loader ROOT SIZES` in a process of its own, because LLVM
costs about 130 MB while it is mapped. ROOT is a directory in bpffs that does not exist yet; it
appears whole, by one rename. SIZES is a JSON object, `source.SIZES` or other numbers for its names.

    ROOT/maps/NAME   ROOT/programs/NAME   ROOT/pods/
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bcc import BPF, lib

from redirector.datapath import libbpf
from redirector.datapath.defects import PROBED, find_defects
from redirector.datapath.layout import About
from redirector.datapath.source import build_id, translation_unit

MAPS = (
    "pods",
    "pods_by_address",
    "cidrs",
    "members",
    "counters",
    "flows",
    "states",
    "sockets",
    "listeners",
    "about",
    "followers",
    "following",
    "lost_events",
)


@dataclass(frozen=True)
class Program:
    """A function of the source and how the kernel must check it (linux/bpf.h)."""

    name: str
    kind: int
    attach: libbpf.AttachType


SOCK_OPS, SK_MSG, CGROUP_SOCK_ADDR, CGROUP_SOCKOPT, SK_LOOKUP = 13, 16, 18, 25, 30
_A = libbpf.AttachType
PROGRAMS = (
    Program("connect4", CGROUP_SOCK_ADDR, _A.CGROUP_INET4_CONNECT),
    Program("connect6", CGROUP_SOCK_ADDR, _A.CGROUP_INET6_CONNECT),
    Program("getpeername4", CGROUP_SOCK_ADDR, _A.CGROUP_INET4_GETPEERNAME),
    Program("getpeername6", CGROUP_SOCK_ADDR, _A.CGROUP_INET6_GETPEERNAME),
    Program("getsockopt", CGROUP_SOCKOPT, _A.CGROUP_GETSOCKOPT),
    Program("sockops", SOCK_OPS, _A.CGROUP_SOCK_OPS),
    Program("redirect", SK_MSG, _A.SK_MSG_VERDICT),
    Program("inbound", SK_LOOKUP, _A.SK_LOOKUP),
)


def load(root: Path, sizes: Mapping[str, int]) -> None:
    """Compile, load, pin under `root`. Leaves nothing when it fails."""
    unit = translation_unit(sizes)
    module = BPF(text=unit, cflags=["-Wno-address-of-packed-member", "-Werror"])
    staging = root.with_name(f"{root.name}-loading-{os.getpid()}")
    try:
        for directory in (".", "maps", "programs", "pods"):
            (staging / directory).mkdir(mode=0o700)
        for name in MAPS:
            libbpf.obj_pin(_map_fd(module, name), staging / "maps" / name)
        for program in PROGRAMS:
            function = module.load_func(
                f"redirector_{program.name}", program.kind, attach_type=int(program.attach)
            )
            libbpf.obj_pin(function.fd, staging / "programs" / program.name)
            if program.attach is _A.SK_MSG_VERDICT:
                libbpf.prog_attach(function.fd, _map_fd(module, "sockets"), program.attach)
        about = About(defects=find_defects(*(_map_fd(module, name) for name in PROBED)))
        about.sha256[:] = build_id(sizes)
        libbpf.map_update(_map_fd(module, "about"), bytes(4), bytes(about))
        staging.rename(root)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _map_fd(module: BPF, name: str) -> int:
    # BPF[...] knows neither sockhash nor sk_storage.
    fd: int = lib.bpf_table_fd(module.module, name.encode())
    if fd < 0:
        raise KeyError(f"the source declares no map {name}")
    return fd


if __name__ == "__main__":
    load(Path(sys.argv[1]), json.loads(sys.argv[2]))
