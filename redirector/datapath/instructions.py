"""What can be changed in a compiled program without a compiler."""

import struct
from collections.abc import Iterator, Mapping

# linux/bpf.h and Documentation/bpf/standardization/instruction-set.rst: 64-bit immediates.
_SIZE = 8
_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1


def relocated(code: bytes, instead: Mapping[int, int]) -> bytes:
    """The program with other map descriptors in the place of those that `instead` names."""
    changed = bytearray(code)
    for at, fd in _map_loads(code):
        struct.pack_into("=i", changed, at + 4, instead.get(fd, fd))
    return bytes(changed)


def _map_loads(code: bytes) -> Iterator[tuple[int, int]]:
    """Offset of each instruction that loads a map, and the map's descriptor."""
    at = 0
    while at < len(code):
        opcode, registers, _, immediate = struct.unpack_from("=BBhi", code, at)
        wide = opcode == _LD_IMM64
        if wide and registers >> 4 == _PSEUDO_MAP_FD:
            yield at, immediate
        at += 2 * _SIZE if wide else _SIZE
