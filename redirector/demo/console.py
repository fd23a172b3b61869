"""What a person watching the demo sees: steps, checks, tables, bars, a summary.

Plain text, so that a log file reads as well as a terminal. A terminal gets colours, and a line
that says what is being waited for.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TextIO

_INDENT = "     "
_BAR = 40


class State(StrEnum):
    """How a step ended."""

    OK = "ok"
    FAILED = "FAILED"
    STOPPED = "stopped"
    NOT_RUN = "not run"


class _Style(StrEnum):
    BOLD = "1"
    DIM = "2"
    RED = "31"
    GREEN = "32"
    YELLOW = "33"
    CYAN = "36"


_STATE_STYLES = {
    State.OK: _Style.GREEN,
    State.FAILED: _Style.RED,
    State.STOPPED: _Style.YELLOW,
    State.NOT_RUN: _Style.YELLOW,
}
#: How often a long wait says what it is at when there is no terminal, seconds.
_PROGRESS_EVERY = 5.0


@dataclass
class Step:
    """A step's name and what became of it; `seconds` is how long it took."""

    number: int
    title: str
    state: State = State.NOT_RUN
    seconds: float = 0.0
    passed: int = 0
    failed: list[str] = field(default_factory=list)


class Console:
    """Writes to `out`; keeps the results of the steps for the summary."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._tty = out.isatty()
        self._step: Step | None = None
        self._started = self._told = time.monotonic()
        self._blank = True

    # -- words

    def line(self, text: str = "") -> None:
        """A line as it is; of several empty ones only the first."""
        if text or not self._blank:
            self._write(f"{text}\n")
        self._blank = not text
        self._told = time.monotonic()

    def title(self, text: str, below: str) -> None:
        """The first lines."""
        self.line(self._styled(text, _Style.BOLD))
        self.line(self._styled(below, _Style.DIM))

    def say(self, text: str = "") -> None:
        """A line of explanation within a step."""
        self.line(f"{_INDENT}{text}" if text else "")

    def quiet(self, text: str) -> None:
        """A line that only the curious read."""
        self.say(self._styled(text, _Style.DIM))

    def waiting(self, text: str) -> None:
        """What is being waited for, until the next line comes; terminals only."""
        if self._tty:
            self._write(self._styled(f"{_INDENT}... {text}", _Style.DIM))

    def progress(self, text: str) -> None:
        """What a long wait is at; without a terminal a line of its own every few seconds."""
        if self._tty:
            self.waiting(text)
        elif time.monotonic() - self._told >= _PROGRESS_EVERY:
            self.quiet(f"... {text}")

    # -- results

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """A step under its heading; it has failed when a check did, or when it is left by error."""
        started = time.monotonic()
        self._step, step.state = step, State.FAILED
        try:
            self.line()
            number = self._styled(f"{step.number:>3}", _Style.CYAN)
            self.line(f"{number}  {self._styled(step.title, _Style.BOLD)}")
            yield
            step.state = State.FAILED if step.failed else State.OK
        except KeyboardInterrupt:
            step.state = State.STOPPED
            raise
        finally:
            step.seconds = time.monotonic() - started
            self._step = None

    def check(self, passed: bool, what: str, seen: object = "") -> bool:
        """A line for something that must be so, with the value that was seen."""
        state = State.OK if passed else State.FAILED
        if self._step is not None:
            if passed:
                self._step.passed += 1
            else:
                self._step.failed.append(what)
        value = f"  {self._styled(str(seen), _Style.DIM)}" if str(seen) else ""
        self.say(f"{self._mark(state)} {what}{value}".rstrip())
        return passed

    def failure(self, text: str) -> None:
        """A step could not be done at all."""
        self.check(False, text)

    def summary(self, steps: Sequence[Step]) -> bool:
        """What passed, in all; True when everything did."""
        self.line()
        self.line(self._styled("     Summary", _Style.BOLD))
        wide = max(len(step.title) for step in steps)
        for step in steps:
            took = f"{step.seconds:6.1f} s" if step.state is not State.NOT_RUN else " " * 8
            noun = "check" if step.passed == 1 else "checks"
            passed = f"{step.passed:>3} {noun}" if step.passed else ""
            line = f"{self._mark(step.state)} {step.number}  {step.title:{wide}} {took}  {passed}"
            self.say(line.rstrip())
            for failed in step.failed:
                self.say(f"{'':11}{self._styled(failed, _Style.RED)}")
        good = sum(step.state is State.OK for step in steps)
        checks = sum(step.passed for step in steps)
        broken = sum(len(step.failed) for step in steps)
        words = f"{good} of {len(steps)} steps passed, {checks} checks ok, {broken} failed"
        style = _Style.GREEN if good == len(steps) else _Style.RED
        total = time.monotonic() - self._started
        self.line()
        self.say(f"{self._styled(words, style)}, {total:.1f} s in all")
        return good == len(steps)

    # -- figures

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns; numbers stand to the right."""
        texts = [[_text(cell) for cell in row] for row in rows]
        columns = range(len(head))
        wide = [max(len(head[c]), *(len(row[c]) for row in texts)) for c in columns]
        right = [all(isinstance(row[c], int | float) for row in rows) for c in columns]

        def laid_out(cells: Sequence[str]) -> str:
            return "   ".join(
                cell.rjust(wide[c]) if right[c] else cell.ljust(wide[c])
                for c, cell in enumerate(cells)
            ).rstrip()

        self.say()
        self.say(self._styled(laid_out(head), _Style.DIM))
        for row in texts:
            self.say(laid_out(row))
        self.say()

    def bars(self, counts: Mapping[str, int], note: str = "") -> None:
        """Shares of a whole as bars."""
        total = sum(counts.values()) or 1
        wide = max(map(len, counts), default=0)
        for name, number in counts.items():
            share = number / total
            bar = ("#" * round(share * _BAR)).ljust(_BAR, ".")
            self.say(f"   {name:{wide}}  {self._bar(bar)}  {share:5.1%}  {number:>5}{note}")

    def _bar(self, bar: str) -> str:
        full = bar.rstrip(".")
        return self._styled(full, _Style.CYAN) + self._styled(bar[len(full) :], _Style.DIM)

    def _mark(self, state: State) -> str:
        return self._styled(f"{state:7}", _STATE_STYLES[state])

    def _styled(self, text: str, style: _Style) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._tty and text else text

    def _write(self, text: str) -> None:
        # Return and erase: the line that said what was waited for is overwritten.
        self._out.write(f"\r\x1b[K{text}" if self._tty else text)
        self._out.flush()


def _text(cell: object) -> str:
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
