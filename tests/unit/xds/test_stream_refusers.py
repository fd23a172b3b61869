"""Clients that refuse without a word about what: each resource is judged by itself in the end."""

from collections.abc import Callable
from typing import Any

import pytest
import test_stream_delta
import test_stream_sotw
from worlds import world
from xds_server.exchange import Response
from xds_server.references import CLUSTER, ENDPOINT, LISTENER, ROUTE
from xds_server.standing import Sync

NAMES = [f"c{number:02}" for number in range(40)]
WORLD = world(clusters=dict.fromkeys(NAMES, 0), routes={"to-web": ("c00", 0)})
#: Of the clusters that the client has, and those that it would have.
Refuses = Callable[[set[str], set[str]], bool]


def everything(_had: set[str], _would: set[str]) -> bool:
    return True


def more_than_one(had: set[str], would: set[str]) -> bool:
    return len(would - had) > 1


def two_together(_had: set[str], would: set[str]) -> bool:
    return {"c07", "c30"} <= would


class Refuser:
    """Takes what it is sent, but for clusters that `refuses` is true of."""

    def __init__(self, variant: str, refuses: Refuses) -> None:
        self.sotw = variant == "sotw"
        self.talk: Any = (test_stream_sotw.Talk if self.sotw else test_stream_delta.Talk)(WORLD)
        self.refuses = refuses
        self.has: set[str] = set()
        for type_url in (CLUSTER, LISTENER):
            self.talk.ask(type_url)
        for type_url in (ENDPOINT, ROUTE):
            self.talk.ask(type_url, WORLD[type_url])

    def rest(self) -> list[Response]:
        """All that it is sent until nothing is left."""
        sent: list[Response] = []
        while response := self.talk.stream.next_response():
            sent.append(response)
            assert len(sent) < 5 * len(NAMES), "never comes to rest"
            self.talk.last[response.type_url] = response
            if response.type_url != CLUSTER:
                self.talk.ack(response.type_url)
                continue
            names = {entry.name for entry in response.resources}
            would = names if self.sotw else self.has | names
            if self.refuses(self.has, would):
                self._refuse()
            else:
                self.talk.ack(CLUSTER)
                self.has = would
        return sent

    def _refuse(self) -> None:
        if self.sotw:
            self.talk.ask(CLUSTER, error="no")
        else:
            self.talk.nack(CLUSTER)


@pytest.mark.parametrize("variant", ["delta", "sotw"])
@pytest.mark.parametrize(
    ("refuses", "kept_back"), [(everything, 40), (more_than_one, 0), (two_together, 1)]
)
def test_what_is_refused_alone_is_kept_back_and_the_others_are_taken(
    variant: str, refuses: Refuses, kept_back: int
) -> None:
    client = Refuser(variant, refuses)
    sent = client.rest()
    stream = client.talk.stream
    assert stream.settled
    assert len(stream.quarantined) == kept_back
    assert len(client.has) == len(NAMES) - kept_back
    assert stream.sync(CLUSTER) is (Sync.NACKED if kept_back else Sync.SYNCED)
    # Nothing but its clusters waits for that.
    assert {response.type_url for response in sent} == {CLUSTER, ENDPOINT, LISTENER, ROUTE}
    assert stream.sync(LISTENER) is Sync.SYNCED
    assert stream.sync(ROUTE) is Sync.SYNCED
    assert client.rest() == []
