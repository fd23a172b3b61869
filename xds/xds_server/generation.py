"""One state of the mesh and the snapshots made of it. Pure."""

from collections.abc import Callable, Iterable, Mapping

from google.protobuf.message import Message

from redirector.errors import RedirectorError
from xds_server.ir import NodeId
from xds_server.snapshot import Encoder, Snapshot

#: What a sidecar should have, as `translate` gives it: type URL -> name -> message.
Translate = Callable[[NodeId], Mapping[str, Mapping[str, Message]]]


class InconsistentSnapshot(RedirectorError):  # noqa: N818 - reads as the state it reports
    """A snapshot names resources that it lacks; a sidecar would wait for them for ever."""


class Generation:
    """Snapshots of one state, each made when first asked for and kept.

    Making them is for one thread at a time; `ready` may be asked from any.
    """

    def __init__(self, translate: Translate) -> None:
        self._translate = translate
        self._encoder = Encoder()
        self._snapshots: dict[NodeId, Snapshot] = {}

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
            snapshot = self._encoder.snapshot(self._translate(node))
            if lacking := snapshot.consistent():
                raise InconsistentSnapshot(
                    f"configuration of pod {node.namespace}/{node.pod}: {'; '.join(lacking)}"
                )
            self._snapshots[node] = snapshot
        return snapshot

    def prepare(self, nodes: Iterable[NodeId]) -> None:
        """Make the snapshots of all these nodes, so that offering them costs nothing."""
        for node in nodes:
            self.snapshot(node)
