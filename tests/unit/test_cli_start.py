"""The command line starts lightly: `enroll` takes less time than importing a large library."""

import subprocess
import sys

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
