"""Changing a compiled program: its maps and the pod that it is for. (linux/bpf.h)"""

import struct

import pytest

from redirector.datapath.instructions import NETNS_MARK, for_pod, portable, relocated

_LD_IMM64, _MOV, _EXIT = 0x18, 0xB7, 0x95


def wide(kind: int, value: int, register: int = 1) -> bytes:
    """A 64-bit immediate: two slots."""
    first = struct.pack("=BBhI", _LD_IMM64, kind << 4 | register, 0, value & 0xFFFFFFFF)
    return first + struct.pack("=BBhI", 0, 0, 0, value >> 32)


def narrow(opcode: int, value: int = 0) -> bytes:
    return struct.pack("=BBhI", opcode, 0, 0, value)


def program(first: int, second: int, netns: int) -> bytes:
    """Two maps, one of them twice; a constant that looks like a descriptor; the pod's cookie."""
    return b"".join(
        (
            wide(1, first),
            wide(1, second),
            wide(0, 5),
            narrow(_MOV, 5),
            wide(0, netns),
            wide(1, first),
            narrow(_EXIT),
        )
    )


def test_maps_are_replaced_and_nothing_else() -> None:
    assert relocated(program(5, 6, NETNS_MARK), {5: 70, 6: 5}) == program(70, 5, NETNS_MARK)


@pytest.mark.parametrize("netns", [1, 0xFFFFFFFF, 0x1_0000_0002, 2**64 - 1])
def test_a_copy_for_a_pod(netns: int) -> None:
    kept = portable(program(5, 6, NETNS_MARK), {5: "pods", 6: "flows", 7: "states"})
    opened = {"pods": 31, "flows": 32}
    assert for_pod(kept, netns, opened.__getitem__) == program(31, 32, netns)


def test_a_map_without_a_name_is_refused() -> None:
    with pytest.raises(KeyError):
        portable(program(5, 6, NETNS_MARK), {5: "pods"})
