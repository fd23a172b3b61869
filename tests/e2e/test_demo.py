"""`redirector demo` as a person runs it: it ends well or says why not, and leaves nothing."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from redirector import machine
from redirector.demo import orphans
from redirector.demo.world import PREFIX
from redirector.lab.node import NETNS_DIRECTORY

#: Far above what it takes, so that a busy machine does not decide.
_PATIENCE = 240


class Demo:
    """A running `redirector demo --no-compare`, its output read as it comes."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "redirector.cli", "demo", "--no-compare"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self.text = ""

    @property
    def name(self) -> str:
        """The name that all its things carry."""
        found = re.search(rf"node ({PREFIX}-\w+)", self.text)
        assert found is not None, self.text
        return found[1]

    def read_to(self, line: str) -> None:
        """Until a line begins so."""
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self.text += text
            if text.startswith(line):
                return
        raise AssertionError(f"no line {line!r} in:\n{self.text}")

    def signal(self, number: int) -> None:
        """As a terminal does: to the whole process group."""
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """The demo alone, without time to clean up."""
        self._process.kill()
        self._process.wait()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int:
        """Read all; the exit code."""
        assert self._process.stdout is not None
        with self._process.stdout as output:
            self.text += output.read()
        return self._process.wait(_PATIENCE)

    def left(self) -> list[str]:
        """What there is of its name on this machine."""
        pins = machine.ensure_bpffs() / self.name
        places = (pins, machine.cgroup2_mount() / self.name, orphans.RUN / self.name)
        namespaces = NETNS_DIRECTORY.glob(f"{self.name}*")
        return [str(path) for path in (*places, *namespaces) if path.exists()] + [
            f"process {path.parent.name}" for path in _command_lines(self.name)
        ]


def _command_lines(name: str) -> Iterator[Path]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if name.encode() in path.read_bytes():
                yield path


@pytest.fixture
def start() -> Iterator["Start"]:
    made = Start()
    yield made
    for demo in made.demos:
        if demo.is_running():
            demo.signal(signal.SIGINT)
            demo.end()


class Start:
    """Starts demos; those that a failed test leaves are ended."""

    def __init__(self) -> None:
        self.demos: list[Demo] = []

    def __call__(self, **environment: str) -> Demo:
        self.demos.append(Demo(environment))
        return self.demos[-1]


def test_every_step_passes_and_nothing_is_left(start: Start) -> None:
    demo = start()
    assert demo.end() == 0, demo.text
    assert "7 of 7 steps passed" in demo.text
    assert "FAILED" not in demo.text
    assert demo.left() == []


def test_interrupted_at_its_busiest_it_takes_everything_down(start: Start) -> None:
    demo = start()
    demo.read_to("  6  ")
    demo.signal(signal.SIGINT)
    demo.read_to("  8  ")
    # The impatient press it again.
    demo.signal(signal.SIGINT)
    assert demo.end() == 130, demo.text
    assert "stopped 6" in demo.text
    assert "FAILED" not in demo.text
    assert demo.left() == []


@pytest.mark.parametrize("line", ["  1  ", "  3  "])
def test_told_to_end_while_it_builds_it_takes_everything_down(start: Start, line: str) -> None:
    demo = start()
    demo.read_to(line)
    demo.signal(signal.SIGTERM)
    assert demo.end() == 130, demo.text
    assert demo.left() == []


def test_a_sidecar_that_does_not_run_fails_the_demo(start: Start) -> None:
    demo = start(REDIRECTOR_ENVOY="/bin/false")
    assert demo.end() == 1, demo.text
    assert "client's Envoy ended with code 1" in demo.text
    assert "not run 4" in demo.text
    assert demo.left() == []


def test_what_a_killed_demo_left_goes_with_the_next(start: Start) -> None:
    demo = start()
    demo.read_to("  4  ")
    demo.kill()
    assert demo.left() != []
    orphans.sweep(PREFIX)
    # Another demo may be at it at this moment.
    deadline = time.monotonic() + _PATIENCE
    while demo.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert demo.left() == []
