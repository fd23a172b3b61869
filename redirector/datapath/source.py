"""The kernel side's source as one translation unit.

bcc rewrites map operations only in the main file, so the files are joined, each behind a #line
that keeps the compiler's messages true.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from redirector import network
from redirector.datapath.btf import enumerator, knows_arrival_interface, member_offset
from redirector.datapath.instructions import NETNS_MARK
from redirector.datapath.layout import static_assertions
from redirector.errors import MachineError, RedirectorError

DIRECTORY = Path(__file__).resolve().parents[2] / "bpf" / "sockops"
#: One for the whole node; the kernel shows it in the node's own network namespace only.
TCP_MEM = Path("/proc/sys/net/ipv4/tcp_mem")
#: init's and kthreadd's; either may be out of reach.
NODE_NETNS = (Path("/proc/1/ns/net"), Path("/proc/2/ns/net"))
TCP_RMEM = Path("/proc/sys/net/ipv4/tcp_rmem")
#: In the order in which they must be compiled.
FILES = (
    "layout.h",
    "maps.h",
    "common.h",
    "events.h",
    "verdict.h",
    "habits.h",
    "room.h",
    "rules.h",
    "connect.c",
    "dns.c",
    "sockopt.c",
    "sockops.c",
    "redirect.c",
    "arrive.c",
    "permission.c",
    "inbound.c",
)
INCLUDES = (
    "uapi/linux/bpf.h",
    "uapi/linux/in.h",
    "uapi/linux/in6.h",
    "uapi/linux/errno.h",
    "linux/socket.h",
)

#: Entries of each map, all pods of a node together; a full map is counted, never silent. And the
#: nanoseconds for which a brief connection counts (habits.h).
SIZES: Mapping[str, int] = {
    "MAX_PODS": 4096,
    "MAX_ADDRESSES": 16384,
    "MAX_CIDRS": 1 << 20,
    "MAX_MEMBERS": 1 << 17,
    "MAX_FLOWS": 1 << 17,
    "MAX_SOCKETS": 1 << 18,
    "MAX_HABITS": 1 << 12,
    "BRIEF_NS": 1_000_000,
    "MAX_ARRIVED": 1 << 18,
}

#: What is read of the kernel's own structs; 0 when the kernel has no BTF. Then a direction's budget
#: is never given back, who connects is known by the real ids, a FIN counts as a byte, and splice()
#: is not refused.
OFFSETS: Mapping[str, tuple[str, ...]] = {
    "RMEM_OFFSET": ("sock", "sk_backlog", "rmem_alloc"),
    "PROTO_OFFSET": ("sock", "__sk_common", "skc_prot"),
    "MEMORY_ALLOCATED_OFFSET": ("proto", "memory_allocated"),
    "SK_SOCKET_OFFSET": ("sock", "sk_socket"),
    "SOCKET_SK_OFFSET": ("socket", "sk"),
    "SOCKET_FLAGS_OFFSET": ("socket", "flags"),
    "SOCKET_FILE_OFFSET": ("socket", "file"),
    "SOCKET_WQ_OFFSET": ("socket", "wq"),
    "WQ_WAIT_OFFSET": ("socket_wq", "wait"),
    "WAIT_HEAD_OFFSET": ("wait_queue_head", "head"),
    "FILE_FLAGS_OFFSET": ("file", "f_flags"),
    "SOCK_ADDR_SK_OFFSET": ("bpf_sock_addr_kern", "sk"),
    "FILE_CRED_OFFSET": ("file", "f_cred"),
    "CRED_OFFSET": ("task_struct", "cred"),
    "FSUID_OFFSET": ("cred", "fsuid"),
    "FSGID_OFFSET": ("cred", "fsgid"),
    # Of x86 alone: system calls have other numbers elsewhere.
    "ORIG_AX_OFFSET": ("pt_regs", "orig_ax"),
}


def translation_unit(sizes: Mapping[str, int]) -> str:
    """All of bpf/sockops, the kernel's own offsets and the layout check, ready for bcc."""
    constants = dict(sizes)
    constants["NETNS_MARK"] = NETNS_MARK
    constants["MAX_RECEIVE_BUFFER"] = int(TCP_RMEM.read_text().split()[2])
    low, pressure, _ = map(int, _tcp_mem().split())
    constants["MEMORY_MARK"] = (low + pressure) // 2
    constants["FLAGS_OFFSET"], constants["ZEROCOPY_BIT"] = zerocopy_flag() or (0, 0)
    constants["HAS_INGRESS_IFINDEX"] = int(knows_arrival_interface())
    constants |= {name: member_offset(*path) or 0 for name, path in OFFSETS.items()}
    parts = [f"#include <{name}>" for name in INCLUDES]
    parts += [f"#define {name} {value}" for name, value in constants.items()]
    parts += [f'#line 1 "{name}"\n{_text(name)}' for name in FILES]
    parts.append('#line 1 "layout.py"')
    parts += static_assertions()
    return "\n".join(parts) + "\n"


def _tcp_mem() -> str:
    if TCP_MEM.exists():
        return TCP_MEM.read_text()
    for netns in NODE_NETNS:
        with contextlib.suppress(OSError, RedirectorError):
            return network.within(netns, TCP_MEM.read_text)
    raise MachineError(
        f"{TCP_MEM}: is told in the node's own network namespace only, and no process there can "
        "be seen; run this in the node's pid namespace (hostPID) or network"
    )


def zerocopy_flag() -> tuple[int, int] | None:
    """Offset of a socket's flags and the bit that SO_ZEROCOPY sets in them; None without BTF."""
    offset = member_offset("sock", "__sk_common", "skc_flags")
    bit = enumerator("sock_flags", "SOCK_ZEROCOPY")
    return None if offset is None or bit is None else (offset, bit)


def build_id(sizes: Mapping[str, int]) -> bytes:
    """SHA-256 (32 bytes) of the source and sizes: tells a running datapath from the shipped one.

    What comes from the running kernel is left out: pins do not outlive it.
    """
    whole = hashlib.sha256(json.dumps(dict(sizes), sort_keys=True).encode())
    for name in FILES:
        whole.update(b"\0" + _text(name).encode())
    return whole.digest()


def layout_id(sizes: Mapping[str, int]) -> str:
    """Names what makes maps compatible: versions of the same name can work on the same maps."""
    code = [re.sub(r"//[^\n]*", "", _text(name)).split() for name in ("layout.h", "maps.h")]
    whole = json.dumps([dict(sizes), code], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def _text(name: str) -> str:
    path = DIRECTORY / name
    try:
        return path.read_text()
    except OSError as error:
        raise MachineError(
            f"{path}: {error.strerror}; the programs' source belongs to the installation: "
            "install the project again"
        ) from error
