"""Compiles and loads the datapath, pins it, ends. The only importer of bcc.

Runs as `python -m redirector.datapath.loader ROOT SIZES` in a process of its own, because LLVM
costs about 130 MB while it is mapped. ROOT is a directory in bpffs that does not exist yet; it
appears whole, by one rename. SIZES is a JSON object, `source.SIZES` or other numbers for its names.
Run with `layout.SELF_TEST` instead, it only tries the kernel and prints what `self_test` found.

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

from redirector.datapath import libbpf, selftest
from redirector.datapath.layout import SELF_TEST, About, Defect
from redirector.datapath.source import SIZES, build_id, translation_unit, zerocopy_flag
from redirector.datapath.trial import TrialMaps, enter_scratch_namespace

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


SOCK_OPS, SK_SKB, SK_MSG, CGROUP_SOCK_ADDR, CGROUP_SOCKOPT, SK_LOOKUP = 13, 14, 16, 18, 25, 30
_A = libbpf.AttachType
PROGRAMS = (
    Program("connect4", CGROUP_SOCK_ADDR, _A.CGROUP_INET4_CONNECT),
    Program("connect6", CGROUP_SOCK_ADDR, _A.CGROUP_INET6_CONNECT),
    Program("getpeername4", CGROUP_SOCK_ADDR, _A.CGROUP_INET4_GETPEERNAME),
    Program("getpeername6", CGROUP_SOCK_ADDR, _A.CGROUP_INET6_GETPEERNAME),
    Program("getsockopt", CGROUP_SOCKOPT, _A.CGROUP_GETSOCKOPT),
    Program("setsockopt", CGROUP_SOCKOPT, _A.CGROUP_SETSOCKOPT),
    Program("sockops", SOCK_OPS, _A.CGROUP_SOCK_OPS),
    Program("redirect", SK_MSG, _A.SK_MSG_VERDICT),
    Program("arrive", SK_SKB, _A.SK_SKB_STREAM_VERDICT),
    Program("inbound", SK_LOOKUP, _A.SK_LOOKUP),
)


#: What acts on the sockets of the sockhash, and is attached to the map itself.
_ON_SOCKHASH = (_A.SK_MSG_VERDICT, _A.SK_SKB_STREAM_VERDICT)


def load(root: Path, sizes: Mapping[str, int]) -> None:
    """Compile, load, try the kernel, pin under `root`. Leaves nothing when it fails."""
    unit = translation_unit(sizes)
    module, functions = _loaded(unit)
    staging = root.with_name(f"{root.name}-loading-{os.getpid()}")
    try:
        for directory in (".", "maps", "programs", "pods"):
            (staging / directory).mkdir(mode=0o700)
        for name in MAPS:
            libbpf.obj_pin(_map_fd(module, name), staging / "maps" / name)
        for name, function in functions.items():
            libbpf.obj_pin(function, staging / "programs" / name)
        about = About(defects=_tried(module))
        about.sha256[:] = build_id(sizes)
        libbpf.map_update(_map_fd(module, "about"), bytes(4), bytes(about))
        staging.rename(root)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def self_test() -> Defect:
    """Compile, load, try the kernel, and pin nothing."""
    module, _ = _loaded(translation_unit({name: min(size, 64) for name, size in SIZES.items()}))
    return _tried(module)


def _loaded(unit: str) -> tuple[BPF, dict[str, int]]:
    """The maps, and each program's descriptor; those of the sockhash are on it."""
    module = BPF(text=unit, cflags=["-Wno-address-of-packed-member", "-Werror"])
    functions: dict[str, int] = {}
    for program in PROGRAMS:
        function = module.load_func(
            f"redirector_{program.name}", program.kind, attach_type=int(program.attach)
        )
        functions[program.name] = function.fd
        if program.attach in _ON_SOCKHASH:
            libbpf.prog_attach(function.fd, _map_fd(module, "sockets"), program.attach)
    return module, functions


def _tried(module: BPF) -> Defect:
    enter_scratch_namespace()
    maps = TrialMaps(*(_map_fd(module, name) for name in ("states", "flows", "sockets")))
    # Where BTF shows SO_ZEROCOPY, sockets that have it are kept out of the sockhash.
    kept_out = Defect.ZEROCOPY if zerocopy_flag() is not None else Defect(0)
    return selftest.run(maps) & ~kept_out


def _map_fd(module: BPF, name: str) -> int:
    # BPF[...] knows neither sockhash nor sk_storage.
    fd: int = lib.bpf_table_fd(module.module, name.encode())
    if fd < 0:
        raise KeyError(f"the source declares no map {name}")
    return fd


if __name__ == "__main__":
    if sys.argv[1] == SELF_TEST:
        print(int(self_test()))
    else:
        load(Path(sys.argv[1]), json.loads(sys.argv[2]))
