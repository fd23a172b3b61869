"""Waiting for what must happen, without saying how soon."""

import time
from collections.abc import Callable
from typing import TypeVar

#: Far beyond what anything here takes; only a failure waits so long.
PATIENCE_S = 60.0

T = TypeVar("T")


def eventually(what: str, probe: Callable[[], T | None]) -> T:
    """The first true answer of `probe`; an assertion that names `what` if there is none."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := probe()):
        assert time.monotonic() < deadline, f"gave up waiting for {what}"
        time.sleep(0.02)
    return found
