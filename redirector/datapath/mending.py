"""Maps whose pins somebody has removed: the programs still have them, and they are pinned again."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from redirector.datapath import libbpf
from redirector.datapath.libbpf import Kind

#: The maps of a generation, by the names of their pins. The kernel knows them by the same.
MAPS = frozenset(
    {
        "pods",
        "pods_by_address",
        "cidrs",
        "members",
        "counters",
        "flows",
        "shares",
        "room",
        "states",
        "sockets",
        "listeners",
        "about",
        "followers",
        "following",
        "lost_events",
        "arrivals",
        "habits",
        "arrived",
    }
)


def lacking(generation: Path) -> set[str]:
    """The maps that have no pin in a generation's directory."""
    with contextlib.suppress(FileNotFoundError):
        return set(MAPS.difference(os.listdir(generation / "maps")))
    return set(MAPS)


def pin_again(generation: Path) -> None:
    """Pin those of `lacking` that a program of the generation uses. OSError when it is refused."""
    wanted = lacking(generation)
    (generation / "maps").mkdir(mode=0o700, exist_ok=True)
    for identity in sorted({used for program in _programs(generation) for used in program}):
        with libbpf.opened_map(identity) as fd:
            name = libbpf.map_info(fd).name.decode()
            if name in wanted:
                libbpf.obj_pin(fd, generation / "maps" / name)
                wanted.remove(name)


def _programs(generation: Path) -> Iterator[frozenset[int]]:
    """The ids of the maps of each program that is pinned, or runs for what is open."""
    for pin in (*generation.glob("programs/*/*"), *generation.glob("pods/*/*")):
        with libbpf.opened(pin) as fd:
            found = libbpf.object_id(fd)
            if found.kind is Kind.PROGRAM:
                yield libbpf.program_info(found.id).maps
            elif found.kind is Kind.LINK:
                yield libbpf.program_info(libbpf.link_info(fd).program).maps
