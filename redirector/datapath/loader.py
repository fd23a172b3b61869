"""Compiles and loads the datapath, pins it, ends. The only importer of bcc.

Runs as `python -m redirector.datapath.loader ROOT SIZES BUILD` in a process of its own, because
LLVM costs about 130 MB while it is mapped. SIZES is a JSON object, `source.SIZES` or other numbers
for its names; BUILD is `source.build_id` of them in hexadecimal, as who wants it loaded knows it.
Below ROOT, a directory in bpffs, it makes or completes the generation of its own layout
(`generation.py`): maps that are pinned already are used as they are, with all that is in them.
Run with `layout.SELF_TEST` instead, it only tries the kernel and prints what `self_test` found.
"""

import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bcc import BPF, lib

from redirector.datapath import generation, libbpf, selftest
from redirector.datapath.btf import knows_system_calls
from redirector.datapath.hooks import PER_POD, SOCKHASH_HOOKS, SPLICE_HOOK
from redirector.datapath.instructions import portable, relocated
from redirector.datapath.layout import SELF_TEST, About, Defect
from redirector.datapath.mending import MAPS
from redirector.datapath.source import (
    SIZES,
    build_id,
    layout_id,
    translation_unit,
    zerocopy_flag,
)
from redirector.datapath.trial import TrialMaps, enter_scratch_namespace
from redirector.errors import MachineError
from redirector.machine import cgroup2_mount


@dataclass(frozen=True)
class Program:
    """A function of the source and how the kernel must check it (linux/bpf.h)."""

    name: str
    kind: int
    attach: libbpf.AttachType | None
    function: str = ""
    """The security hook that it is for."""


SOCK_OPS, SK_SKB, SK_MSG, CGROUP_SOCK_ADDR, CGROUP_SOCKOPT, SK_LOOKUP = 13, 14, 16, 18, 25, 30
LSM, SYSCALL = 29, 31
_A = libbpf.AttachType
PROGRAMS = (
    Program("connect4", CGROUP_SOCK_ADDR, _A.CGROUP_INET4_CONNECT),
    Program("connect6", CGROUP_SOCK_ADDR, _A.CGROUP_INET6_CONNECT),
    Program("sendmsg4", CGROUP_SOCK_ADDR, _A.CGROUP_UDP4_SENDMSG),
    Program("sendmsg6", CGROUP_SOCK_ADDR, _A.CGROUP_UDP6_SENDMSG),
    Program("recvmsg4", CGROUP_SOCK_ADDR, _A.CGROUP_UDP4_RECVMSG),
    Program("recvmsg6", CGROUP_SOCK_ADDR, _A.CGROUP_UDP6_RECVMSG),
    Program("getpeername4", CGROUP_SOCK_ADDR, _A.CGROUP_INET4_GETPEERNAME),
    Program("getpeername6", CGROUP_SOCK_ADDR, _A.CGROUP_INET6_GETPEERNAME),
    Program("getsockopt", CGROUP_SOCKOPT, _A.CGROUP_GETSOCKOPT),
    Program("setsockopt", CGROUP_SOCKOPT, _A.CGROUP_SETSOCKOPT),
    Program("sockops", SOCK_OPS, _A.CGROUP_SOCK_OPS),
    Program("redirect", SK_MSG, _A.SK_MSG_VERDICT),
    Program("arrive", SK_SKB, _A.SK_SKB_STREAM_VERDICT),
    Program("inbound", SK_LOOKUP, _A.SK_LOOKUP),
    Program("forget", SYSCALL, None),
)
#: Loaded where the self-test finds that it is needed, and works: Linux 6.0 with the BPF LSM on.
SPLICE = Program("splice", LSM, _A.LSM_CGROUP, "file_permission")
#: Together with it. Whether it is needed cannot be tried: the kernel would fall over.
ZEROCOPY = Program("zerocopy", LSM, _A.LSM_CGROUP, "socket_getsockopt")


def load(root: Path, sizes: Mapping[str, int]) -> None:
    """Compile, try the kernel, load, pin below `root`. Leaves nothing when it fails."""
    module, own, programs = _loaded(translation_unit(sizes))
    defects, optional = _tried(module, own)
    about = generation.about(build_id(sizes), defects)
    root.mkdir(mode=0o700, exist_ok=True)
    directory = root / layout_id(sizes)
    staging = directory.with_name(f"{directory.name}-loading-{os.getpid()}")
    try:
        for part in (".", "maps", "programs", "pods"):
            (staging / part).mkdir(mode=0o700)
        if not directory.exists():
            for name, fd in own.items():
                libbpf.obj_pin(fd, staging / "maps" / name)
            programs |= _load_programs(module, {}, optional)
            _pin(module, programs, own, staging / "programs" / build_id(sizes).hex())
            libbpf.map_update(own["about"], bytes(4), bytes(about))
            staging.rename(directory)
        else:
            _replace(module, optional, own, directory, staging / "programs", about)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(
    module: BPF,
    optional: Sequence[Program],
    own: Mapping[str, int],
    directory: Path,
    staging: Path,
    about: About,
) -> None:
    """Put the programs in the place of another build's, on the maps that are there."""
    for name, fd in own.items():
        if not (directory / "maps" / name).exists():
            # Of the same layout, but the other build had no need to find it again; or its pin was
            # removed, and no program has it any more.
            libbpf.obj_pin(fd, directory / "maps" / name)
    pinned = {name: libbpf.obj_get(directory / "maps" / name) for name in MAPS}
    instead = {fd: pinned[name] for name, fd in own.items()}
    programs = _load_programs(module, instead, (*PROGRAMS, *optional))
    build = bytes(about.sha256).hex()
    _pin(module, programs, own, staging / build)
    # Links hold their programs; what is pinned serves new ones only.
    shutil.rmtree(directory / "programs", ignore_errors=True)
    staging.rename(directory / "programs")
    _attach_to_maps(programs, pinned)
    libbpf.map_update(pinned["about"], bytes(4), bytes(about))


def _load_programs(
    module: BPF, instead: Mapping[int, int], which: Sequence[Program] = PROGRAMS
) -> dict[str, int]:
    """Each program's descriptor. `instead`: map descriptors to use in the place of others."""
    functions: dict[str, int] = {}
    for program in which:
        name = f"redirector_{program.name}".encode()
        code = relocated(module.dump_func(name), instead)
        if program.attach is None or program.function:
            functions[program.name] = libbpf.prog_load(
                program.name, program.kind, program.attach, code, program.function
            )
            continue
        fd = lib.bcc_func_load(
            module.module,
            program.kind,
            name,
            code,
            len(code),
            lib.bpf_module_license(module.module),
            lib.bpf_module_kern_version(module.module),
            0,
            None,
            0,
            None,
            int(program.attach),
        )
        if fd < 0:
            error = ctypes.get_errno()
            text = f"Failed to load BPF program {program.name}: {os.strerror(error)}"
            raise OSError(error, text)
        functions[program.name] = fd
    return functions


def _attach_to_maps(programs: Mapping[str, int], maps: Mapping[str, int]) -> None:
    for hook, kind in SOCKHASH_HOOKS:
        libbpf.prog_attach(programs[hook], maps["sockets"], kind)


def _pin(
    module: BPF, programs: Mapping[str, int], maps: Mapping[str, int], directory: Path
) -> None:
    directory.mkdir(mode=0o700)
    code = module.dump_func(f"redirector_{PER_POD}".encode())
    kept = libbpf.map_create_array(PER_POD, portable(code, {fd: name for name, fd in maps.items()}))
    # Loaded once all the same, so that the kernel's refusal comes before any pod.
    for name, fd in {**programs, PER_POD: kept}.items():
        libbpf.obj_pin(fd, directory / name)


def self_test() -> Defect:
    """Compile, load, try the kernel, and pin nothing."""
    sizes = {name: min(size, 64) for name, size in SIZES.items()}
    module, maps, _ = _loaded(translation_unit(sizes))
    return _tried(module, maps)[0]


def _loaded(unit: str) -> tuple[BPF, dict[str, int], dict[str, int]]:
    """The maps and programs, by their names; those of the sockhash are on it."""
    module = BPF(text=unit, cflags=["-Wno-address-of-packed-member", "-Werror"])
    maps = {name: _map_fd(module, name) for name in MAPS}
    programs = _load_programs(module, {})
    _attach_to_maps(programs, maps)
    return module, maps, programs


def _tried(module: BPF, maps: Mapping[str, int]) -> tuple[Defect, Sequence[Program]]:
    """What is wrong, and what to load beside `PROGRAMS` so that no more is."""
    enter_scratch_namespace()
    trial = TrialMaps(*(maps[name] for name in ("states", "flows", "sockets", "arrived")))
    # Where BTF shows SO_ZEROCOPY, sockets that have it are kept out of the sockhash.
    kept_out = Defect.ZEROCOPY if zerocopy_flag() is not None else Defect(0)
    found = selftest.run(trial) & ~kept_out
    if Defect.SPLICE_OUT in found and _can_refuse_splice(module, trial):
        return found & ~Defect.SPLICE_OUT, (SPLICE, ZEROCOPY)
    return found, ()


def _can_refuse_splice(module: BPF, trial: TrialMaps) -> bool:
    if not knows_system_calls():
        return False
    try:
        programs = _load_programs(module, {}, (SPLICE, ZEROCOPY))
        with _refusing_splice(programs[SPLICE.name]):
            return not selftest.run(trial, Defect.SPLICE_OUT)
    except (OSError, MachineError):  # no such hook, or the kernel does not want to be told
        return False


@contextlib.contextmanager
def _refusing_splice(program: int) -> Iterator[None]:
    """To all processes that this one sees, for a few milliseconds; it concerns its own alone."""
    cgroup = os.open(cgroup2_mount(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        link = libbpf.link_create(program, cgroup, SPLICE_HOOK[1])
        try:
            yield
        finally:
            libbpf.link_detach(link)
            os.close(link)
    finally:
        os.close(cgroup)


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
        root, sizes, build = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
        if build_id(sizes).hex() != build:
            sys.exit("error: this installation has changed under a running program; restart that")
        load(root, sizes)
