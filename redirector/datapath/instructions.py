"""What can be changed in a compiled program without a compiler: its maps, and one constant.

A program that is made for each pod is kept as `portable` code, which names its maps.
"""

import struct
from collections.abc import Callable, Iterator, Mapping

# linux/bpf.h and Documentation/bpf/standardization/instruction-set.rst: 64-bit immediates.
_SIZE = 8
_LD_IMM64 = 0x18
_CONSTANT, _PSEUDO_MAP_FD = 0, 1
#: Stands in the source for the netns cookie of the pod that a program is made for.
NETNS_MARK = 0x7265_6469_7265_6374


def relocated(code: bytes, instead: Mapping[int, int]) -> bytes:
    """The program with other map descriptors in the place of those that `instead` names."""
    changed = bytearray(code)
    for at, kind, fd in _wide_loads(code):
        if kind == _PSEUDO_MAP_FD:
            struct.pack_into("=i", changed, at + 4, instead.get(fd, fd))
    return bytes(changed)


def portable(code: bytes, maps: Mapping[int, str]) -> bytes:
    """The program with the names of its maps, given by their descriptors; KeyError names others."""
    used = dict.fromkeys(fd for _, kind, fd in _wide_loads(code) if kind == _PSEUDO_MAP_FD)
    names = [maps[fd] for fd in used]
    numbers = {fd: number for number, fd in enumerate(used)}
    return "\n".join(names).encode() + b"\0" + relocated(code, numbers)


def for_pod(kept: bytes, netns: int, descriptor: Callable[[str], int]) -> bytes:
    """What `portable` made, for one pod's netns cookie; `descriptor` opens a map by its name."""
    names, _, code = kept.partition(b"\0")
    opened = {number: descriptor(name.decode()) for number, name in enumerate(names.split(b"\n"))}
    changed = bytearray(relocated(code, opened))
    for at, kind, value in _wide_loads(code):
        if kind == _CONSTANT and value == NETNS_MARK:
            struct.pack_into("=I", changed, at + 4, netns & 0xFFFFFFFF)
            struct.pack_into("=I", changed, at + _SIZE + 4, netns >> 32)
    return bytes(changed)


def _wide_loads(code: bytes) -> Iterator[tuple[int, int, int]]:
    """Offset, kind and value of each instruction that loads 64 bits; a map's is its descriptor."""
    at = 0
    while at < len(code):
        opcode, registers, _, low = struct.unpack_from("=BBhI", code, at)
        if opcode != _LD_IMM64:
            at += _SIZE
            continue
        (high,) = struct.unpack_from("=I", code, at + _SIZE + 4)
        yield at, registers >> 4, high << 32 | low
        at += 2 * _SIZE
