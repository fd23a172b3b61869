"""Deletes flows as the programs do: with its flow a connection gives back its pod's room (room.h).

Deleting the map's entry alone would leave it counted for ever.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from redirector.datapath import libbpf

#: Deletes the flow of this key and id, struct flow_name; False when it was gone.
Forget = Callable[[bytes, bytes], bool]


@contextlib.contextmanager
def forgetting(generation: Path, flows: int) -> Iterator[Forget]:
    """What deletes flows of the generation in this directory; `flows` is their map's descriptor.

    Another version's generation may have no such program, and a damaged one may have lost it: then
    the entry alone is deleted.
    """
    program = next((generation / "programs").glob("*/forget"), None)
    if program is None:
        yield lambda key, _: libbpf.map_delete(flows, key)
        return
    with libbpf.opened(program) as fd:
        yield lambda key, flow_id: bool(libbpf.prog_run(fd, key + flow_id))
