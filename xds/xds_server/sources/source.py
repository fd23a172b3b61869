"""What a source of objects is: a directory of manifests, or a cluster's API server."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from xds_server.errors import Problem
from xds_server.sources.objects import KubeObject


@dataclass(frozen=True)
class Change:
    """`reason` is for people; `at` is when it was made or, if that is not known, noticed: seconds
    since the epoch."""

    reason: str
    at: float


class Source(Protocol):
    """Its text form is what messages call it. Used from one event loop."""

    async def read(self) -> tuple[list[KubeObject], list[Problem]]:
        """Every object there is now, and what could not be read; waits until that is known.

        An object that has not changed may be the same value again. InputError: there is no source.
        """

    def changes(self) -> AsyncGenerator[Change, None]:
        """Every change since the source was made, as long as the caller asks for more; what changed
        meanwhile is one change."""
