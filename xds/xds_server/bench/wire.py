"""A gRPC stream over HTTP/2 as seen by its client, without I/O: bytes in, messages and bytes out.

It knows one stream of one connection and no more of RFC 9113 than that needs, so that a thousand
of them cost less than the server they measure. General libraries (h2, grpc.aio) cost several times
what the server does for each message, and the clients' CPU would be what is measured.
"""

from collections.abc import Iterator
from enum import IntEnum

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_STREAM = 1
_DEFAULT_WINDOW = 65_535
_MAX_WINDOW = 2**31 - 1
_MAX_FRAME = 16_384
_INITIAL_WINDOW_SIZE = 4
_ACK = 0x1
_END_STREAM = 0x1
_END_HEADERS = 0x4
#: HPACK (RFC 7541): an indexed field, a literal with an indexed name, a literal with its name.
_POST, _HTTP, _AUTHORITY, _PATH = b"\x83", b"\x86", b"\x01", b"\x04"
_CONTENT_TYPE, _NAMED = b"\x0f\x10", b"\x00"


class _Kind(IntEnum):
    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8


class StreamEnded(Exception):  # noqa: N818 - reads as the state it reports
    """The server ended the stream or the connection."""


class ClientStream:
    """One bidirectional call. `take_output()` is what has to be sent."""

    def __init__(self, path: str) -> None:
        headers = b"".join(
            (
                _POST,
                _HTTP,
                _PATH + _text(path),
                _AUTHORITY + _text("localhost"),
                _CONTENT_TYPE + _text("application/grpc"),
                _NAMED + _text("te") + _text("trailers"),
            )
        )
        settings = b"".join(
            number.to_bytes(2, "big") + value.to_bytes(4, "big")
            # No dynamic table, no push, and a window that never closes.
            for number, value in ((1, 0), (2, 0), (_INITIAL_WINDOW_SIZE, _MAX_WINDOW))
        )
        grow = (_MAX_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big")
        self._output = bytearray(
            _PREFACE
            + _frame(_Kind.SETTINGS, 0, 0, settings)
            + _frame(_Kind.WINDOW_UPDATE, 0, 0, grow)
            + _frame(_Kind.HEADERS, _END_HEADERS, _STREAM, headers)
        )
        self._input = bytearray()
        self._message = bytearray()
        self._waiting = bytearray()
        self._connection_window = self._stream_window = self._initial = _DEFAULT_WINDOW
        self._taken = 0
        #: Bytes of messages received so far, with gRPC's 5 bytes before each.
        self.received = 0

    def take_output(self) -> bytes:
        """What is ready for the wire; the caller sends all of it."""
        taken = bytes(self._output)
        self._output.clear()
        return taken

    def send(self, message: bytes) -> None:
        """Queue a message, within what the server lets us send."""
        self._waiting += b"\0" + len(message).to_bytes(4, "big") + message
        self._flush()

    def receive(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with these bytes. StreamEnded when there will be no
        more."""
        self._input += data
        view, at = memoryview(self._input), 0
        try:
            while len(view) - at >= 9:
                length = int.from_bytes(view[at : at + 3], "big")
                if len(view) - at - 9 < length:
                    break
                body = view[at + 9 : at + 9 + length]
                stream = int.from_bytes(view[at + 5 : at + 9], "big")
                self._handle(view[at + 3], view[at + 4], stream, body)
                body.release()
                at += 9 + length
        finally:
            view.release()
        del self._input[:at]
        yield from self._messages()

    def _messages(self) -> Iterator[bytes]:
        start = 0
        while len(self._message) - start >= 5:
            end = start + 5 + int.from_bytes(self._message[start + 1 : start + 5], "big")
            if end > len(self._message):
                break
            yield bytes(memoryview(self._message)[start + 5 : end])
            start = end
        if start:
            del self._message[:start]

    def _handle(self, kind: int, flags: int, stream: int, body: memoryview) -> None:
        if kind == _Kind.DATA:
            self._message += body
            self.received += len(body)
            self._taken += len(body)
            if self._taken > _MAX_WINDOW // 2:
                more = self._taken.to_bytes(4, "big")
                self._output += _frame(_Kind.WINDOW_UPDATE, 0, 0, more)
                self._output += _frame(_Kind.WINDOW_UPDATE, 0, _STREAM, more)
                self._taken = 0
        elif kind == _Kind.WINDOW_UPDATE:
            more_to_send = int.from_bytes(body, "big")
            if stream:
                self._stream_window += more_to_send
            else:
                self._connection_window += more_to_send
            self._flush()
        elif kind == _Kind.PING and not flags & _ACK:
            self._output += _frame(_Kind.PING, _ACK, 0, bytes(body))
        elif kind == _Kind.SETTINGS and not flags & _ACK:
            self._settings(body)
        elif kind in (_Kind.RST_STREAM, _Kind.GOAWAY) or (
            kind == _Kind.HEADERS and flags & _END_STREAM
        ):
            raise StreamEnded

    def _settings(self, body: memoryview) -> None:
        for at in range(0, len(body), 6):
            value = int.from_bytes(body[at + 2 : at + 6], "big")
            if int.from_bytes(body[at : at + 2], "big") == _INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._initial
                self._initial = value
        self._output += _frame(_Kind.SETTINGS, _ACK, 0, b"")
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            size = min(len(self._waiting), _MAX_FRAME, self._stream_window, self._connection_window)
            if size <= 0:
                return
            self._output += _frame(_Kind.DATA, 0, _STREAM, bytes(self._waiting[:size]))
            del self._waiting[:size]
            self._stream_window -= size
            self._connection_window -= size


def _text(value: str) -> bytes:
    """An HPACK string, not Huffman coded, shorter than 127 bytes."""
    return bytes((len(value),)) + value.encode()


def _frame(kind: _Kind, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body
