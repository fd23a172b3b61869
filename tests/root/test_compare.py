"""The comparison as a user runs it: every case on every rung, real steering, nothing left."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from redirector.compare.cases import BASELINES, CASES, Metric, Rung, why_not
from redirector.compare.topology import EXPLICIT, tune
from redirector.lab import Node
from redirector.machine import bpffs_mount, cgroup2_mount

pytestmark = pytest.mark.root

#: As the CLI calls it, in a process of its own: signals and affinity are the process's.
COMMAND = """
import argparse, sys
from redirector import compare
from redirector.errors import RedirectorError
parser = argparse.ArgumentParser()
compare.add_arguments(parser)
try:
    sys.exit(compare.run(parser.parse_args(), sys.stdout))
except RedirectorError as error:
    sys.exit(f"error: {error}")
"""


@contextmanager
def running(*words: object) -> "Iterator[subprocess.Popen[str]]":
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()


def node_name(progress: Iterable[str]) -> str:
    """Reads up to the line that tells what everything on this machine is called."""
    text = ""
    for line in progress:
        text += line
        found = re.search(r"node (rdrcmp-\w+):", line)
        if found:
            return found[1]
    pytest.fail(f"ended before it measured: {text}")


def leftovers(name: str) -> list[Path]:
    bpffs = bpffs_mount()
    places = [Path("/run/netns"), cgroup2_mount(), Path("/tmp"), *([bpffs] if bpffs else [])]
    return [entry for place in places for entry in place.glob(f"{name}*")]


def test_every_case_is_measured_on_every_rung(tmp_path: Path) -> None:
    data, page = tmp_path / "figures.json", tmp_path / "page.html"
    options = ("--rounds", 2, "--seconds", 0.05, "--json", data, "--html", page)
    with running(*options) as process:
        output, progress = process.communicate(timeout=240)
    assert process.returncode == 0, progress
    assert leftovers(node_name(progress.splitlines())) == []
    whole = json.loads(data.read_text())
    assert whole["rounds"] == 2
    assert whole["host"]["pinned_to_cpu"] in os.sched_getaffinity(0)
    measured = {(row["case"], row["rung"]) for row in whole["results"]}
    possible = {(c.name, r.value) for c in CASES for r in Rung if why_not(c, r) is None}
    assert measured == possible
    latency = {case.name: case.has_latency for case in CASES}
    for row in whole["results"]:
        assert row["ops_per_s"] > 0, row
        assert row["cpu_us_per_op"] > 0, row
        percentiles = [row[key] for key in ("p50_us", "p90_us", "p99_us", "p999_us")]
        if latency[row["case"]]:
            assert 0 < percentiles[0] <= percentiles[1] <= percentiles[2] <= percentiles[3], row
        else:
            assert percentiles == [None] * 4, row
    ratios = {(r["case"], r["rung"], r["versus"], r["metric"]) for r in whole["ratios"]}
    for case, rung in possible:
        for versus in BASELINES:
            if rung != versus and (case, versus.value) in possible:
                assert (case, rung, versus.value, Metric.OPS.value) in ratios
                assert (case, rung, versus.value, Metric.CPU.value) in ratios
    assert "http-2-sidecars-c16" in output
    assert page.read_text().endswith("</html>\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals) -> None:
    options = ("--cases", "bulk-1KiB", "--rungs", "iptables,ebpf+sockmap", "--rounds", 100)
    with running(*options) as process:
        assert process.stderr is not None
        name = node_name(process.stderr)
        assert leftovers(name)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode in (-number, 128 + number)
    assert leftovers(name) == []


def test_a_missing_program_is_named_with_its_package() -> None:
    process = subprocess.run(
        [sys.executable, "-c", COMMAND, "--quick"],
        env={"PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert process.returncode == 1
    assert "luajit is not installed; install it: apt-get install luajit" in process.stderr
    assert "Traceback" not in process.stderr


def fill(low: int, high: int) -> list[int]:
    """Every port of a range that the kernel gives away by itself; runs in a pod."""
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{low} {high}")
    given = []
    with ExitStack() as stack, suppress(OSError):
        while len(given) <= high - low:
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            given.append(taken.getsockname()[1])
    return sorted(given)


def test_no_client_is_given_the_port_of_a_server(node: Node) -> None:
    pod = node.pod("tuned")
    pod.call(tune)
    low, high = min(EXPLICIT.values()), max(EXPLICIT.values()) + 4
    expected = sorted(set(range(low, high + 1)) - set(EXPLICIT.values()))
    assert pod.call(fill, low, high) == expected
