"""The load program measures what it says, on TCP and Unix sockets, or fails; it never guesses."""

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from redirector.compare.cases import CASES
from redirector.compare.load import measure, parse
from redirector.compare.topology import LOAD_SCRIPT, Way
from redirector.errors import RedirectorError

LUAJIT = shutil.which("luajit") or "luajit"


def start(role: str, *words: object) -> "subprocess.Popen[str]":
    with LOAD_SCRIPT.open() as script:
        return subprocess.Popen(
            [LUAJIT, "-", role, *map(str, words)],
            stdin=script,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def run_load(role: str, where: str, number: int) -> tuple[int, dict[str, float], str]:
    """Exit code, figures, and complaint of one short load."""
    process = start(role, where, 0.02, 0.1, number)
    output, complaint = process.communicate(timeout=30)
    lines = output.splitlines()
    pairs = (word.split("=") for word in lines[-1].split()) if len(lines) > 1 else ()
    return process.returncode, {key: float(value) for key, value in pairs}, complaint


@pytest.fixture(params=["tcp", "unix"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "unix":
        return str(tmp_path / "s")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def server(role: str, where: str) -> Iterator[None]:
    process = start(role, where)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                dial(where).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.005)
        yield
    finally:
        process.kill()
        process.communicate()


def dial(where: str) -> socket.socket:
    if where.startswith("/"):
        unix = socket.socket(socket.AF_UNIX)
        unix.connect(where)
        return unix
    host, port = where.split(":")
    return socket.create_connection((host, int(port)))


@pytest.mark.parametrize(
    ("served", "load", "number"),
    [
        ("serve-echo", "echo", 64),
        ("serve-echo", "echo", 65536),
        ("serve-http", "http", 1),
        ("serve-http", "http", 16),
        ("serve-http", "connect", 1),
    ],
)
def test_operations_and_latencies_are_counted(
    where: str, served: str, load: str, number: int
) -> None:
    with server(served, where):
        code, figures, complaint = run_load(load, where, number)
    assert (code, complaint) == (0, "")
    assert figures["operations"] > 0
    assert figures["elapsed_s"] >= 0.1
    percentiles = [figures[f"p{p}_us"] for p in ("50", "90", "99", "999")]
    assert percentiles == sorted(percentiles)
    assert percentiles[0] > 0


def test_a_stream_counts_what_arrived(where: str) -> None:
    with server("serve-sink", where):
        code, figures, complaint = run_load("bulk", where, 1024)
    assert (code, complaint) == (0, "")
    assert set(figures) == {"operations", "elapsed_s"}
    assert figures["operations"] > 0


@contextmanager
def python_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """One connection at a time, handled by `answer`."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_a_latency_is_that_of_the_operation() -> None:
    def dawdle(connection: socket.socket) -> None:
        while data := connection.recv(64, socket.MSG_WAITALL):
            time.sleep(0.004)
            connection.sendall(data)

    with python_server(dawdle) as where:
        code, figures, complaint = run_load("echo", where, 64)
    assert (code, complaint) == (0, "")
    assert figures["p50_us"] >= 4000
    assert figures["operations"] <= figures["elapsed_s"] / 0.004


def respond(text: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        while connection.recv(4096):
            connection.sendall(text)

    return answer


@pytest.mark.parametrize("load", ["http", "connect"])
def test_an_answer_other_than_200_fails(load: str) -> None:
    refusal = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
    with python_server(respond(refusal)) as where:
        code, _, complaint = run_load(load, where, 1)
    assert code == 1
    assert "not a whole 200" in complaint
    assert "503" in complaint


def test_a_200_that_turns_into_something_else_fails() -> None:
    answers = iter([b"200 OK"] * 3 + [b"500 NO"] * 10_000)

    def change(connection: socket.socket) -> None:
        while connection.recv(4096):
            connection.sendall(b"HTTP/1.1 " + next(answers) + b"\r\ncontent-length: 0\r\n\r\n")

    with python_server(change) as where:
        code, _, complaint = run_load("http", where, 1)
    assert code == 1
    assert "no 200" in complaint


@pytest.mark.parametrize("load", ["echo", "http", "connect", "bulk"])
def test_a_far_end_that_hangs_up_fails(load: str) -> None:
    with python_server(lambda _connection: None) as where:
        code, _, complaint = run_load(load, where, 1)
    assert code == 1
    assert where in complaint


def test_nobody_listening_fails(where: str) -> None:
    code, _, complaint = run_load("echo", where, 64)
    assert code == 1
    assert complaint.startswith(f"connect {where}: ")


def test_cpu_time_is_shared_by_the_operations() -> None:
    found = parse("operations=200 elapsed_s=0.5 p50_us=2 p90_us=3 p99_us=4 p999_us=5\n", 1000)
    assert (found.ops_per_s, found.cpu_us_per_op) == (400, 5)
    assert (found.p50_us, found.p90_us, found.p99_us, found.p999_us) == (2, 3, 4, 5)
    assert parse("operations=1 elapsed_s=1\n", 7).p50_us is None


def test_no_operation_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(RedirectorError, match="not one operation"):
        parse("operations=0 elapsed_s=0.5\n", 10)


@pytest.mark.parametrize(("unseen", "ends_well"), [(2, True), (3, False)])
def test_cpu_time_that_was_read_too_late_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, unseen: int, ends_well: bool
) -> None:
    read = iter([0] * unseen + [7])
    line = "operations=1 elapsed_s=1\n"
    monkeypatch.setattr("redirector.compare.load._run", lambda *_, **__: (line, next(read)))
    run = partial(measure, Path("luajit"), CASES[0], cast(Way, None), cpu=0, warmup=0, seconds=0.05)
    if ends_well:
        assert run().cpu_us_per_op == 7
    else:
        with pytest.raises(RedirectorError, match=r"too busy to measure 0\.05 s"):
            run()
