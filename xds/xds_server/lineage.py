"""From each state of the mesh to the generation that is served of it. Pure."""

from xds_server.generation import Generation
from xds_server.ir import Mesh
from xds_server.translate import Translator

#: What finds out which pieces a sidecar has, and makes none.
_ARRANGING = frozenset({"_row", "_inbound_of"})


class Lineage:
    """One generation after the other: what a change leaves alone is neither translated nor encoded
    again."""

    def __init__(self) -> None:
        self._translator: Translator | None = None
        self._generation: Generation | None = None

    def next(self, mesh: Mesh) -> Generation:
        """The generation of this mesh."""
        self._translator = Translator(mesh, self._translator)
        self._generation = Generation(self._translator.resources, self._generation)
        return self._generation

    @property
    def translated(self) -> int:
        """How many pieces the last generation had to translate so far."""
        made = self._translator.memo.made if self._translator else {}
        return sum(times for name, times in made.items() if name not in _ARRANGING)
