"""Step 8: everything goes, and what is left is looked for."""

import time

from redirector.datapath.libbpf import Kind
from redirector.demo import leftovers
from redirector.demo.change import nat_rules
from redirector.demo.console import Console
from redirector.demo.world import World

_WHAT = {Kind.PROGRAM: "programs", Kind.MAP: "maps", Kind.LINK: "links"}


def take_down(world: World, console: Console) -> None:
    """Stop, unenroll, remove; then look with the kernel's eyes."""
    console.waiting("taking everything down")
    inventory = leftovers.take_inventory(world)
    started = time.monotonic()
    world.stop_children()
    problems = world.enrollment.uninstall()
    console.check(not problems, "uninstall had nothing to complain of", "; ".join(problems))
    rules = [line for pod in world.pods for line in nat_rules(world, pod) if "REDIRECTOR" in line]
    console.check(not rules, "no rule of ours in any pod's namespace", "; ".join(rules))
    world.close()
    console.check(True, "everything taken down", f"{time.monotonic() - started:.1f} s")
    console.say()
    for kind, what in _WHAT.items():
        _look(console, what, len(inventory.of(kind)), leftovers.objects_left(inventory, kind))
    _look(console, "pin directories", 1, leftovers.paths_left(inventory.pins))
    _look(
        console,
        "network namespaces",
        len(inventory.namespaces),
        leftovers.namespaces_left(inventory),
    )
    _look(console, "cgroups", len(inventory.cgroups), leftovers.paths_left(*inventory.cgroups))
    _look(console, "processes", len(inventory.processes), leftovers.processes_left(inventory))
    _look(console, "directories of files", 1, leftovers.paths_left(inventory.files))


def _look(console: Console, what: str, there_were: int, left: "list[int] | list[str]") -> None:
    seen = f"there were {there_were}" + (f", left: {left}" if left else "")
    console.check(not left, f"no {what} left", seen)
