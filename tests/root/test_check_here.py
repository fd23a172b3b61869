"""`redirector check` on the machine that the tests run on, which set-up made ready."""

import io

import pytest

from redirector.check import run

pytestmark = pytest.mark.root


def test_this_machine_has_all_that_is_needed() -> None:
    out = io.StringIO()
    assert run(out) == 0, out.getvalue()
