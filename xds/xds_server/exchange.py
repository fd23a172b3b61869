"""What a stream sends, and what the client answers. Pure."""

from dataclasses import dataclass, field
from functools import cached_property

from xds_server.snapshot import ABSENT, Encoded


@dataclass(frozen=True)
class Ack:
    """The client applied a response."""

    type_url: str
    nonce: str


@dataclass(frozen=True)
class Nack:
    """The client refused a response, or a part of it; `error` is its own text."""

    type_url: str
    nonce: str
    version: str
    error: str


@dataclass(frozen=True)
class Response:
    """One message to the client. `frames` are its encoding in pieces, most of which other clients
    are sent, too: it is whole only on its way to the wire."""

    type_url: str
    nonce: str
    version: str
    resources: tuple[Encoded, ...]
    removed: tuple[str, ...]
    frames: tuple[bytes, ...] = field(repr=False)

    @cached_property
    def size(self) -> int:
        """Its encoding's bytes."""
        return sum(map(len, self.frames))

    @cached_property
    def body(self) -> bytes:
        """Its encoding; to be asked for on its way to the wire only."""
        return b"".join(self.frames)

    def versions(self) -> dict[str, str]:
        """name -> version of everything in it, ABSENT for what it takes away."""
        sent = {entry.name: entry.version for entry in self.resources}
        return sent | dict.fromkeys(self.removed, ABSENT)
