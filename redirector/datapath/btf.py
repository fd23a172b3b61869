"""One question to the running kernel's BTF: at which offset of a struct a member lies."""

import ctypes
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")
_BTF_KIND_STRUCT = 4
_BTF_KIND_UNION = 5


class _Type(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size", ctypes.c_uint32))


class _Member(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32))


def member_offset(struct: str, *path: str) -> int | None:
    """Bytes from the start of `struct` to the member reached by `path`; None without BTF.

    Source: Documentation/bpf/btf.rst (struct btf_type, struct btf_member); libbpf reads the file.
    """
    lib = ctypes.CDLL("libbpf.so.1")
    lib.btf__load_vmlinux_btf.restype = ctypes.c_void_p
    lib.btf__type_by_id.restype = ctypes.POINTER(_Type)
    lib.btf__name_by_offset.restype = ctypes.c_char_p
    if not VMLINUX.exists():
        return None
    btf = ctypes.c_void_p(lib.btf__load_vmlinux_btf())
    if not btf.value:
        return None
    try:
        kind = lib.btf__find_by_name_kind(btf, struct.encode(), _BTF_KIND_STRUCT)
        offset = 0
        for name in path:
            found = _find(lib, btf, kind, name.encode())
            if found is None:
                return None
            kind, bits = found
            offset += bits // 8
        return offset
    finally:
        lib.btf__free(btf)


def _find(lib: ctypes.CDLL, btf: ctypes.c_void_p, kind: int, name: bytes) -> tuple[int, int] | None:
    """(type id, offset in bits) of a member, anonymous structs and unions looked into."""
    if kind <= 0:
        return None
    type_pointer = lib.btf__type_by_id(btf, kind)
    info = type_pointer.contents.info
    if info >> 24 & 0x1F not in (_BTF_KIND_STRUCT, _BTF_KIND_UNION):
        return None
    has_bitfields = info >> 31
    first = ctypes.addressof(type_pointer.contents) + ctypes.sizeof(_Type)
    for member in (_Member * (info & 0xFFFF)).from_address(first):
        bits = member.offset & 0xFFFFFF if has_bitfields else member.offset
        if lib.btf__name_by_offset(btf, member.name) == name:
            return member.type, bits
        if not member.name:
            inner = _find(lib, btf, member.type, name)
            if inner is not None:
                return inner[0], bits + inner[1]
    return None
