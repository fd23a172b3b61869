"""One state of the mesh and the snapshots made of it. Pure."""

from collections.abc import Callable, Iterable, Mapping

from google.protobuf.message import Message

from redirector.errors import RedirectorError
from xds_server.ir import NodeId
from xds_server.snapshot import Encoder, Snapshot

#: What a sidecar should have, as `translate` gives it: type URL -> name -> message.
Translate = Callable[[NodeId], Mapping[str, Mapping[str, Message]]]


#: Of so many nodes snapshots are kept: twice as many as there may be clients, who say which they
#: are. The first are forgotten then, and made again where they are asked for.
_NODES = 20_000


class InconsistentSnapshot(RedirectorError):  # noqa: N818 - reads as the state it reports
    """A snapshot names resources that it lacks; a sidecar would wait for them for ever."""


class Generation:
    """Snapshots of one state, each made when first asked for and kept.

    What the generation that it comes `after` had encoded is taken over where `translate` gives the
    same messages. Making snapshots is for one thread at a time; `ready` may be asked from any.
    """

    def __init__(self, translate: Translate, after: "Generation | None" = None) -> None:
        self._translate = translate
        self._encoder: Encoder = Encoder(after._encoder if after else None)
        self._snapshots: dict[NodeId, Snapshot] = {}
        #: What `translate` gave, by its identity, and the snapshot of it.
        self._kinds: dict[int, tuple[Mapping[str, Mapping[str, Message]], Snapshot]] = {}

    @property
    def encodings(self) -> int:
        """How many resources were serialized so far, for all sidecars together."""
        return self._encoder.encodings

    def ready(self, node: NodeId) -> Snapshot | None:
        """The node's snapshot, if it is made already."""
        return self._snapshots.get(node)

    def snapshot(self, node: NodeId) -> Snapshot:
        """The node's snapshot. InconsistentSnapshot rather than one that cannot work."""
        snapshot = self._snapshots.get(node)
        if snapshot is None:
            resources = self._translate(node)
            known = self._kinds.get(id(resources))
            if known is None:
                known = (resources, self._encoder.snapshot(resources))
                if lacking := known[1].consistent():
                    raise InconsistentSnapshot(
                        f"configuration of pod {node.namespace}/{node.pod}: {'; '.join(lacking)}"
                    )
                self._kinds[id(resources)] = known
            if len(self._snapshots) >= _NODES:
                del self._snapshots[next(iter(self._snapshots))]
            snapshot = self._snapshots[node] = known[1]
        return snapshot

    def prepare(self, nodes: Iterable[NodeId]) -> None:
        """Make the snapshots of all these nodes, so that offering them costs nothing."""
        for node in nodes:
            self.snapshot(node)
