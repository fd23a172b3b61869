"""A node for tests that need the real kernel. Without root they fail; they do not skip."""

import os
from collections.abc import Iterator

import pytest

from redirector.lab import Node


@pytest.fixture
def node() -> Iterator[Node]:
    if os.geteuid() != 0:
        pytest.fail("this test makes namespaces and cgroups: run it as root")
    with Node(prefix="rdrtest") as made:
        yield made
