"""Folders for what others than root are to read."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def open_folder(under: str | None = None) -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rdrtest-", dir=under) as name:
        path = Path(name)
        path.chmod(0o755)
        yield path
