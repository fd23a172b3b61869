"""Getting a process into a pod: cgroup, network namespace, user, before its first instruction."""

import ctypes
import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Place:
    """Where and as whom a process runs. `cpus` empty: wherever the scheduler likes."""

    netns: Path
    cgroup: Path
    uid: int = 0
    gid: int = 0
    cpus: frozenset[int] = frozenset()

    def enter(self) -> None:
        """Move the calling process here; call it in a fresh child only, there is no way back."""
        # "0" is the writer itself; first, because an unprivileged user may not move itself.
        (self.cgroup / "cgroup.procs").write_text("0")
        fd = os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(fd, CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(self.netns))
        finally:
            os.close(fd)
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)
        if (self.uid, self.gid) != (0, 0):
            os.setgroups([])
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)


def call_in(place: Place, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
    """The result of `function(*args)`, run in a forked child at `place`; its exception likewise.

    Result and exception must be picklable. Raises TimeoutError after `timeout` seconds; the
    child is killed then.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _serve_call(writer, place, function, args)
    os.close(writer)
    try:
        answer = _read_all(reader, time.monotonic() + timeout)
        if answer is None:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(reader)
        _, status = os.waitpid(pid, 0)
    name = getattr(function, "__qualname__", repr(function))
    if answer is None:
        raise TimeoutError(f"{name} did not return within {timeout} s")
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        raise ChildProcessError(f"{name} ended without an answer, exit code {code}")
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise value
    return value


def _serve_call(
    writer: int, place: Place, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """The child's side; ends the process without running the parent's exit handlers."""
    status = 1
    try:
        try:
            place.enter()
            answer = pickle.dumps((True, function(*args)))
        except BaseException as error:
            try:
                answer = pickle.dumps((False, error))
                pickle.loads(answer)  # some exceptions pickle, but cannot be made again
            except Exception:
                answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
        with open(writer, "wb") as pipe:
            pipe.write(answer)
        status = 0
    finally:
        os._exit(status)


def _read_all(fd: int, deadline: float) -> bytes | None:
    """All bytes up to end of file, or None when the deadline passes first."""
    chunks: list[bytes] = []
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
