"""Where each sidecar stands, type by type, as an operator is told it. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from xds_server.ir import NodeId


class Sync(StrEnum):
    """What a sidecar has of a type, compared with what it should have."""

    SYNCED = "SYNCED"
    #: It was not sent the last change yet, or has not answered.
    STALE = "STALE"
    #: It never asked.
    NOT_SENT = "NOT SENT"
    #: It refused something that nothing has taken the place of.
    NACKED = "NACKED"


@dataclass(frozen=True)
class TypeStanding:
    """`version` is what was accepted last, or "" if that is not known; times are seconds since the
    epoch. `error` is the sidecar's own text about what it refused last, also if that is mended."""

    type_url: str
    sync: Sync
    version: str = ""
    accepted_at: float | None = None
    error: str = ""
    refused_version: str = ""
    refused_at: float | None = None


@dataclass(frozen=True)
class Standing:
    """One connected sidecar; `connected_at` in seconds since the epoch."""

    node: NodeId
    variant: str
    connected_at: float
    types: tuple[TypeStanding, ...]
