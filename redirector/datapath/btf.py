"""Questions to the running kernel's BTF: where a struct's member lies, what a name is worth."""

import ctypes
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T", bound=ctypes.Structure)

VMLINUX = Path("/sys/kernel/btf/vmlinux")
_BTF_KIND_STRUCT = 4
_BTF_KIND_UNION = 5
_BTF_KIND_ENUM = 6


class _Type(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32))


class _Member(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32))


class _Enumerator(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("value", ctypes.c_int32))


def member_offset(struct: str, *path: str) -> int | None:
    """Bytes from the start of `struct` to the member reached by `path`; None without BTF.

    Source: Documentation/bpf/btf.rst (struct btf_type, struct btf_member); libbpf reads the file.
    """
    lib, btf = _vmlinux()
    if not btf:
        return None
    kind = lib.btf__find_by_name_kind(btf, struct.encode(), _BTF_KIND_STRUCT)
    offset = 0
    for name in path:
        found = _find(lib, btf, kind, name.encode())
        if found is None:
            return None
        kind, bits = found
        offset += bits // 8
    return offset


def enumerator(enum: str, name: str) -> int | None:
    """The value of one name of an enum; None without BTF, or when the kernel has no such name."""
    lib, btf = _vmlinux()
    kind = lib.btf__find_by_name_kind(btf, enum.encode(), _BTF_KIND_ENUM) if btf else 0
    if kind <= 0:
        return None
    for found in _following(lib.btf__type_by_id(btf, kind), _Enumerator):
        if lib.btf__name_by_offset(btf, found.name) == name.encode():
            return int(found.value)
    return None


@cache
def _vmlinux() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """libbpf, and the kernel's BTF as it reads it, null when there is none.

    Never freed: who asks is the loader, which ends soon.
    """
    lib = ctypes.CDLL("libbpf.so.1")
    lib.btf__load_vmlinux_btf.restype = ctypes.c_void_p
    lib.btf__type_by_id.restype = ctypes.POINTER(_Type)
    lib.btf__name_by_offset.restype = ctypes.c_char_p
    return lib, ctypes.c_void_p(lib.btf__load_vmlinux_btf() if VMLINUX.exists() else None)


def _following(kind: "ctypes._Pointer[_Type]", entry: type[T]) -> "Iterable[T]":
    """A type's members or enumerators, which lie behind it."""
    first = ctypes.addressof(kind.contents) + ctypes.sizeof(_Type)
    array: Iterable[T] = (entry * (kind.contents.info & 0xFFFF)).from_address(first)
    return array


def _find(lib: ctypes.CDLL, btf: ctypes.c_void_p, kind: int, name: bytes) -> tuple[int, int] | None:
    """(type id, offset in bits) of a member, anonymous structs and unions looked into."""
    if kind <= 0:
        return None
    type_pointer = lib.btf__type_by_id(btf, kind)
    info = type_pointer.contents.info
    if info >> 24 & 0x1F not in (_BTF_KIND_STRUCT, _BTF_KIND_UNION):
        return None
    has_bitfields = info >> 31
    for member in _following(type_pointer, _Member):
        bits = member.offset & 0xFFFFFF if has_bitfields else member.offset
        if lib.btf__name_by_offset(btf, member.name) == name:
            return member.type, bits
        if not member.name:
            inner = _find(lib, btf, member.type, name)
            if inner is not None:
                return inner[0], bits + inner[1]
    return None


def knows_arrival_interface() -> bool:
    """Whether sk_lookup programs are told it (bpf_sk_lookup.ingress_ifindex, Linux 5.17)."""
    return member_offset("bpf_sk_lookup_kern", "ingress_ifindex") is not None


def knows_system_calls() -> bool:
    """Whether programs can tell which system call they run in: on x86, with BTF."""
    return member_offset("pt_regs", "orig_ax") is not None
