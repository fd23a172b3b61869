"""When Python looks for garbage in cycles, and when the process gives memory back."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: Objects made before the young are looked through, and how many times that before the old are.
_THRESHOLDS = (20_000, 20, 20)


@contextmanager
def postponed() -> Iterator[None]:
    """While a mesh is read for the first time hardly anything of it is garbage, and to look for it
    takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle() -> None:
    """To be called once what stays for ever is loaded: it is not looked through again.

    The state of a thousand clients and the mesh is some hundred thousand objects with hardly a
    cycle; looking through them all took longer than to serve a change.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


def give_back() -> None:
    """Give memory that was freed back to the system, where the C library knows how (glibc, which
    of its own accord gives back only the end of its heap). Other threads go on meanwhile."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
