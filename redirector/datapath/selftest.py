"""What the running kernel does with redirected bytes: a line for each thing that programs rely on.

The loader runs the lines through its own programs before any pod uses them. `--accelerate auto`
steers without short-circuit where one fails; `redirector check` prints all.
"""

import array
import contextlib
import errno
import fcntl
import os
import select
import socket
import tempfile
import termios
from collections.abc import Callable
from dataclasses import dataclass

from redirector.datapath.layout import Defect, Flow, Side
from redirector.datapath.trial import Trial, TrialMaps, trial

EVERYTHING = ~Defect(0)
_MIB = 1 << 20
_SO_ZEROCOPY, _MSG_ZEROCOPY = 60, 0x4000000  # asm-generic/socket.h, linux/socket.h
_SPLICE_F_NONBLOCK = 2  # fcntl.h


@dataclass(frozen=True)
class Line:
    """One thing to try, and what it means for programs when it fails."""

    defect: Defect
    name: str
    meaning: str
    holds: Callable[[Trial], bool]
    deferred: bool = False
    passes: str = "as with TCP"


def run(maps: TrialMaps, which: Defect = EVERYTHING) -> Defect:
    """Try the lines of these bits on a connection of its own each; the bits of those that fail."""
    found = Defect(0)
    for line in (line for line in LINES if line.defect in which):
        with trial(maps, deferred=line.deferred) as made:
            try:
                holds = line.holds(made)
            except OSError:  # a time-out, or an error that TCP would not have answered
                holds = False
            if not holds:
                found |= line.defect
    return found


def _redirected(made: Trial, server: socket.socket, data: bytes) -> None:
    """Send from the client; OSError unless the bytes went to the server's queue."""
    before: Flow = made.flow()
    made.client.sendall(data)
    if made.flow().bytes[Side.CLIENT] != before.bytes[Side.CLIENT] + len(data):
        raise OSError(f"what was sent to {server.getsockname()} was not redirected")


def _receive(end: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer when the stream has ended."""
    got = bytearray()
    while len(got) < size and (chunk := end.recv(size - len(got))):
        got += chunk
    return bytes(got)


def _readable(end: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(end.fileno(), termios.FIONREAD, count)
    return count[0]


def _redirects(made: Trial) -> bool:
    with made.accept() as server:
        _redirected(made, server, b"ask")
        server.sendall(b"answer")
        return (_receive(server, 3), _receive(made.client, 6)) == (b"ask", b"answer")


def _order(made: Trial) -> bool:
    """Bytes sent before anybody accepts go by TCP, and so must all that follow."""
    made.client.sendall(b"1111")
    made.client.sendall(b"2222")
    with made.accept() as server:
        made.client.sendall(b"3333")
        return _receive(server, 12) == b"111122223333"


def _fionread_redirected(made: Trial) -> bool:
    with made.accept() as server:
        _redirected(made, server, bytes(100))
        before = _readable(server)
        server.recv(60)
        return (before, _readable(server)) == (100, 40)


def _fionread_passed(made: Trial) -> bool:
    made.client.sendall(bytes(100))
    with made.accept() as server:
        # What comes by TCP once the socket is in the sockhash, too.
        made.client.sendall(bytes(100))
        before = _readable(server)
        _receive(server, 160)
        return (before, _readable(server)) == (200, 40)


def _seam(made: Trial) -> bool:
    """recv() crosses from redirected bytes to passed ones: less than asked for means no more."""
    with made.accept() as server:
        _redirected(made, server, b"a" * 1000)
        made.pass_on()
        made.client.sendall(b"b" * 500)
        return server.recv(3000) == b"a" * 1000 + b"b" * 500


def _overlap(made: Trial) -> bool:
    """A segment that begins with bytes which came before: TCP merges what it sends again."""
    with made.accept() as server:
        made.pass_on()
        made.client.sendall(b"a" * 10_000)
        first = _receive(server, 10_000)
        made.resend(b"a" * 9000 + b"b" * 600, new=600)
        return first + _receive(server, 600) == b"a" * 10_000 + b"b" * 600


def _unread(made: Trial) -> bool:
    """Who replies tells what it has not read: that is what bounds the queue (verdict.h)."""
    with made.accept() as server:
        _redirected(made, server, bytes(100))
        server.recv(60)
        server.sendall(b"x")
        return bool(made.flow().unread[Side.SERVER] == 40)


def _half_close(made: Trial) -> bool:
    with made.accept() as server:
        _redirected(made, server, b"x" * 5000)
        made.client.shutdown(socket.SHUT_WR)
        if len(_receive(server, 5001)) != 5000:
            return False
        server.sendall(b"answer")
        server.shutdown(socket.SHUT_WR)
        return _receive(made.client, 7) == b"answer"


def _close(made: Trial) -> bool:
    with made.accept() as server:
        _redirected(made, server, b"x" * 5000)
        made.client.close()
        return len(_receive(server, 5001)) == 5000


def _stalled(made: Trial) -> bool:
    """A reader that never reads: its sender is told EAGAIN before long, and no byte is lost."""
    with made.accept() as server:
        made.client.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 4 * _MIB:
                sent += made.client.send(bytes(32768))
        return sent < 4 * _MIB and len(_receive(server, sent)) == sent


def _edges(made: Trial) -> bool:
    """An event for each arrival, read or not, and none without."""
    with made.accept() as server, select.epoll() as poll:
        poll.register(server, select.EPOLLIN | select.EPOLLET)
        seen: list[bool] = [bool(poll.poll(0))]
        for _ in range(2):
            _redirected(made, server, b"x")
            seen += [bool(poll.poll(0)), bool(poll.poll(0))]
        server.recv(2)
        seen.append(bool(poll.poll(0)))
        _redirected(made, server, b"x")
        seen.append(bool(poll.poll(0)))
        return seen == [False, True, False, True, False, False, True]


def _peek(made: Trial) -> bool:
    with made.accept() as server:
        _redirected(made, server, b"header")
        _redirected(made, server, b"body")
        peeked = [server.recv(8, socket.MSG_PEEK) for _ in range(2)]
        return peeked == [b"headerbo"] * 2 and _receive(server, 10) == b"headerbody"


def _sendfile(made: Trial) -> bool:
    """File to socket, between two send()s."""
    with made.accept() as server, tempfile.TemporaryFile() as file:
        body = os.urandom(20_000)
        file.write(body)
        file.flush()
        _redirected(made, server, b"header")
        sent = 0
        while more := os.sendfile(made.client.fileno(), file.fileno(), sent, len(body) - sent):
            sent += more
        made.client.sendall(b"trailer")
        return _receive(server, 20_013) == b"header" + body + b"trailer"


def _splice_in(made: Trial) -> bool:
    """Pipe to socket, between two send()s; the pipe's pages are written again at once."""
    reader, writer = os.pipe()
    try:
        with made.accept() as server:
            _redirected(made, server, b"header")
            pieces = [os.urandom(4000) for _ in range(4)]
            for piece in pieces:
                os.write(writer, piece)
                os.splice(reader, made.client.fileno(), len(piece))
            made.client.sendall(b"trailer")
            return _receive(server, 16_013) == b"header" + b"".join(pieces) + b"trailer"
    finally:
        os.close(reader)
        os.close(writer)


def _splice_out(made: Trial) -> bool:
    """EINVAL is as good: programs then copy."""
    reader, writer = os.pipe()
    try:
        with made.accept() as server:
            _redirected(made, server, b"request")
            try:
                spliced = os.splice(server.fileno(), writer, 100, flags=_SPLICE_F_NONBLOCK)
            except OSError as error:
                return error.errno == errno.EINVAL and server.recv(100) == b"request"
            return spliced == 7 and os.read(reader, 100) == b"request"
    finally:
        os.close(reader)
        os.close(writer)


def _zerocopy(made: Trial) -> bool:
    """By the time an answer has come back, the kernel has told that it is done with the bytes."""
    with made.accept() as server:
        made.client.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
        made.client.send(bytes(20_000), _MSG_ZEROCOPY)
        _receive(server, 20_000)
        server.sendall(b"x")
        made.client.recv(1)
        made.client.setblocking(False)  # with a time-out, Python would wait for what never comes
        _, told, _, _ = made.client.recvmsg(0, 512, socket.MSG_ERRQUEUE)
        return bool(told)


LINES: tuple[Line, ...] = (
    Line(
        Defect.REDIRECT,
        "redirection",
        "bytes do not reach the peer's queue",
        _redirects,
    ),
    Line(
        Defect.ORDER,
        "order, late accept",
        "bytes sent before accept() are read after later ones",
        _order,
        deferred=True,
    ),
    Line(
        Defect.FIONREAD,
        "FIONREAD, redirected",
        "readers are not told of redirected bytes; nginx, Java and .NET would wait for ever",
        _fionread_redirected,
    ),
    Line(
        Defect.FIONREAD_PASSED,
        "FIONREAD, passed",
        "readers are not told of bytes that TCP brought; nginx, Java and .NET would wait for ever",
        _fionread_passed,
    ),
    Line(
        Defect.SEAM,
        "redirected, then passed",
        "recv() answers less than there is; nginx, Netty and tokio take that for all of it",
        _seam,
    ),
    Line(
        Defect.OVERLAP,
        "segments that overlap",
        "bytes that TCP has to send again are read twice",
        _overlap,
    ),
    Line(
        Defect.UNREAD,
        "unread bytes",
        "a socket does not know what it has left unread, so that nothing bounds its queue",
        _unread,
    ),
    Line(
        Defect.HALF_CLOSE,
        "half-close, data queued",
        "bytes or the end of the stream are lost",
        _half_close,
    ),
    Line(Defect.CLOSE, "close, data queued", "bytes sent before close() are lost", _close),
    Line(
        Defect.STALLED,
        "reader that never reads",
        "its sender is not held back, or bytes are lost",
        _stalled,
    ),
    Line(
        Defect.EPOLL,
        "epoll, edge-triggered",
        "readers miss that bytes have come, or are woken for none",
        _edges,
    ),
    Line(Defect.PEEK, "MSG_PEEK", "peeked bytes differ from those that are read", _peek),
    Line(
        Defect.SENDFILE,
        "sendfile() into it",
        "a file's bytes arrive changed, or in another order",
        _sendfile,
    ),
    Line(
        Defect.SPLICE_IN,
        "splice() into it",
        "a pipe's bytes arrive changed, or in another order",
        _splice_in,
    ),
    Line(
        Defect.SPLICE_OUT,
        "splice() out of it",
        # Whatever refuses it refuses TCP_ZEROCOPY_RECEIVE, which is an oops and cannot be tried.
        "splice() does not see redirected bytes (Go's io.Copy and HAProxy's splice-auto would wait "
        "for ever), and TCP_ZEROCOPY_RECEIVE would crash the kernel; it can refuse both with "
        "its BPF LSM on (`bpf` in lsm= of its command line)",
        _splice_out,
        passes="works, or is refused so that programs copy",
    ),
    Line(
        Defect.ZEROCOPY,
        "MSG_ZEROCOPY",
        "nobody is told that the bytes are sent",
        _zerocopy,
    ),
)
