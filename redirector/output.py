"""A command's standard output, to its end: what it does not take fails the command, in one line."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO, cast

from redirector.errors import MachineError, RedirectorError


def run(program: str, command: Callable[[TextIO], int]) -> int:
    """A command's exit code, given where it prints to. A user's error is one line on stderr."""
    try:
        with _whole() as out:
            return command(out)
    except _ReaderGone:  # redirector status | head
        return 0
    except RedirectorError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code


class _ReaderGone(Exception):  # noqa: N818 - reads as the state it reports
    """Nobody reads what is printed any more."""


class _Checked(io.TextIOBase):
    """A stream that tells its own errors from those of others."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        with self._told() as stream:
            return stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._told() as stream:
                stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno() if self._stream is not None else super().fileno()

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    @contextlib.contextmanager
    def _told(self) -> Iterator[TextIO]:
        try:
            if self._stream is None:
                raise MachineError("standard output: is closed; give the command one")
            yield self._stream
        except OSError as error:
            self._give_up()
            if isinstance(error, BrokenPipeError):
                raise _ReaderGone from None
            raise MachineError(
                f"standard output: {error.strerror}; not all that there was to tell is written"
            ) from None

    def _give_up(self) -> None:
        # What is buffered would be tried once more as Python ends.
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.fileno())


@contextlib.contextmanager
def _whole() -> Iterator[TextIO]:
    out = cast(TextIO, _Checked(sys.stdout))
    with contextlib.redirect_stdout(out):
        try:
            yield out
        finally:
            out.flush()
