"""The command line starts lightly: `enroll` takes less time than importing a large library."""

import os
import subprocess
import sys
from typing import IO

import pytest

_DEAR = ("pyroute2", "yaml", "asyncio", "grpc", "google.protobuf", "redirector.lab", "bcc")


def test_what_enrolling_does_not_need_is_not_imported() -> None:
    script = (
        "import sys\n"
        "from redirector.cli import main\n"
        f"before = [name for name in {_DEAR} if name in sys.modules]\n"
        "try: main(['enroll', '--help'])\n"
        "except SystemExit: pass\n"
        f"print(before, [name for name in {_DEAR} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[] []", done.stderr


@pytest.mark.parametrize(("command", "option"), [("compare", "--rounds"), ("demo", "--no-compare")])
def test_options_of_dear_commands_are_declared_when_they_are_given(
    command: str, option: str
) -> None:
    argv = [sys.executable, "-m", "redirector.cli", command]
    told = subprocess.run([*argv, "--help"], capture_output=True, text=True)
    assert option in told.stdout
    wrong = subprocess.run([*argv, "--nonesuch"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--nonesuch" in wrong.stderr


PRINTING = (
    ("redirector", "redirector.cli", "--help"),
    ("redirector", "redirector.cli", "bootstrap web --ip 10.0.0.1 --xds unix:/run/xds"),
    ("xds-server", "xds_server.cli", "--help"),
)


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("program", "module", "command"), PRINTING)
def test_output_that_cannot_be_written_is_told_in_a_line(
    program: str, module: str, command: str, buffered: str
) -> None:
    script = f"import sys; from {module} import main; sys.exit(main({command.split()}))"

    def run(to: IO[bytes] | int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONUNBUFFERED": buffered},
            stdout=to,
            stderr=subprocess.PIPE,
            text=True,
        )
        return done.returncode, done.stderr

    with open("/dev/full", "wb") as full:
        lost = "not all that there was to tell is written"
        assert run(full) == (
            3,
            f"{program}: standard output: No space left on device; {lost}\n",
        )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(writer) == (0, "")
    finally:
        os.close(writer)


def test_no_standard_output_is_told_in_a_line() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m redirector.cli --help >&-"],
        capture_output=True,
        text=True,
    )
    told = "redirector: standard output: is closed; give the command one\n"
    assert (done.returncode, done.stderr) == (3, told)
