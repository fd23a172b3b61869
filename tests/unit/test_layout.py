"""The structs that programs build on their stacks."""

import ctypes

import pytest

from redirector.datapath.layout import STRUCTS, Struct


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.c_name)
def test_every_byte_is_a_fields(struct: type[Struct]) -> None:
    """An initializer leaves padding unset, and kernels before 6.3 refuse to hand that on."""
    assert sum(ctypes.sizeof(field[1]) for field in struct._fields_) == ctypes.sizeof(struct)
