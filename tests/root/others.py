"""Programs of others beside ours: loads tests/root/others.c and pins what it holds.

Runs as `python others.py DIRECTORY` in a process of its own, as our own loader does: LLVM is large.
The rest is for tests, which attach the pinned programs and read what they have counted.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.libbpf import AttachType
from redirector.machine import kernel_headers

SOURCE = Path(__file__).with_suffix(".c")
#: Program -> its type, and the attach type that the kernel checks it for (linux/bpf.h).
PROGRAMS: dict[str, tuple[int, AttachType | None]] = {
    "connect4": (18, AttachType.CGROUP_INET4_CONNECT),
    "getsockopt": (25, AttachType.CGROUP_GETSOCKOPT),
    "sockops": (13, AttachType.CGROUP_SOCK_OPS),
    "deaf_sockops": (13, AttachType.CGROUP_SOCK_OPS),
    "sk_lookup": (30, AttachType.SK_LOOKUP),
    "ingress": (3, None),
    "egress": (3, None),
}
ON_CGROUP = ("connect4", "getsockopt", "sockops")


class Seen(IntEnum):
    """enum seen of others.c."""

    CONNECT = 0
    GETSOCKOPT = 1
    SOCKOPS = 2
    RTT = 3
    LOOKUP = 4
    INGRESS = 5
    EGRESS = 6


class Flag(IntEnum):
    """How a program is attached to a cgroup without a link (linux/bpf.h)."""

    ALONE = 0
    OVERRIDE = 1
    MULTI = 2


@dataclass(frozen=True)
class Others:
    """The pinned programs of somebody else."""

    pins: Path

    def seen(self) -> dict[Seen, int]:
        """How often each of them ran."""
        with libbpf.opened(self.pins / "seen") as fd:
            return {
                each: int.from_bytes(
                    libbpf.map_lookup(fd, each.to_bytes(4, "little"), 8) or b"", "little"
                )
                for each in Seen
            }

    def serve(self, service: tuple[str, int], to: tuple[str, int], denied: str) -> None:
        """Tell the load balancer of its one service, and of an address that it refuses."""
        value = b"".join(IPv4Address(ip).packed for ip in (service[0], to[0], denied))
        value += service[1].to_bytes(2, "big") + to[1].to_bytes(2, "big")
        with libbpf.opened(self.pins / "services") as fd:
            libbpf.map_update(fd, bytes(4), value)

    @contextmanager
    def linked(self, name: str, target: Path) -> Iterator[None]:
        """Attached by a link, beside others."""
        _, kind = PROGRAMS[name]
        assert kind is not None
        fd = os.open(target, os.O_RDONLY)
        with libbpf.opened(self.pins / name) as program:
            link = libbpf.link_create(program, fd, kind)
        try:
            yield
        finally:
            os.close(link)
            os.close(fd)

    @contextmanager
    def attached(self, name: str, cgroup: Path, flag: Flag) -> Iterator[None]:
        """Attached without a link, as older software does."""
        _, kind = PROGRAMS[name]
        assert kind is not None
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
        fd = os.open(cgroup, os.O_RDONLY)
        try:
            with libbpf.opened(self.pins / name) as program:
                failed = library.bpf_prog_attach(program, fd, int(kind), int(flag))
                assert not failed, os.strerror(ctypes.get_errno())
                yield
                failed = library.bpf_prog_detach2(program, fd, int(kind))
                assert not failed, "it was detached by somebody else"
        finally:
            os.close(fd)


def load(pins: Path) -> Others:
    """Compile, load and pin; in a process of its own."""
    environment = {**os.environ, "BCC_KERNEL_SOURCE": str(kernel_headers())}
    subprocess.run([sys.executable, __file__, pins], env=environment, check=True)
    return Others(pins)


def _main(pins: Path) -> None:
    from bcc import BPF, lib

    module = BPF(src_file=str(SOURCE), cflags=["-Wno-address-of-packed-member"])
    for name, (kind, attach) in PROGRAMS.items():
        function = (
            module.load_func(f"other_{name}", kind)
            if attach is None
            else module.load_func(f"other_{name}", kind, attach_type=int(attach))
        )
        libbpf.obj_pin(function.fd, pins / name)
    for name in ("seen", "services"):
        libbpf.obj_pin(lib.bpf_table_fd(module.module, name.encode()), pins / name)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
