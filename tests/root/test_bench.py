"""The node's figures are measured to the end, and nothing stays behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from redirector.lab.node import NETNS_DIRECTORY
from redirector.machine import ensure_bpffs

pytestmark = pytest.mark.root


def left() -> set[Path]:
    return {*ensure_bpffs().glob("rdrbench-*"), *NETNS_DIRECTORY.glob("rdrbench-*")}


def test_a_small_run(tmp_path: Path) -> None:
    before = left()
    report = tmp_path / "figures.json"
    argv = [sys.executable, "-m", "redirector.bench.command", "--pods", "2", "--rounds", "1"]
    done = subprocess.run(
        [*argv, "--seconds", "0.1", "--json", report], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = json.loads(report.read_text())
    assert len(lines) == len(done.stdout.splitlines())
    told = {line["name"]: line["value"]["median"] for line in lines}
    for mode in ("ebpf", "iptables"):
        assert told[f"{mode}: enroll pods 2 to 3"] > 0
        assert told[f"{mode}: new connections a second, 2 other pods to none"] > 0
    assert left() <= before
