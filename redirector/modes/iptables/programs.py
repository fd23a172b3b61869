"""The programs iptables and ipset, run in a pod's namespace."""

import os
import re
import subprocess
import time
from collections.abc import Iterable

from redirector import users
from redirector.errors import DatapathError, MachineError
from redirector.machine import find_tool
from redirector.model import Pod
from redirector.modes.iptables import sets
from redirector.modes.iptables.tables import Family
from redirector.modes.iptables.transaction import State, parse, rule_packets, transaction
from redirector.network import run_in

#: How long to wait for another program that changes rules (/run/xtables.lock).
_LOCK_SECONDS = 10
#: How long the kernel may take to let go of the sets of rules that are gone
#: (nf_tables_trans_destroy_work).
_RELEASE_SECONDS = 5.0


def read(pod: Pod, family: Family) -> State:
    # Without -t, so that looking does not make a table.
    return parse(_run(pod, [family.save]))


def read_packets(pod: Pod, family: Family) -> dict[str, int]:
    return rule_packets(_run(pod, [family.save, "-c", "-t", "nat"]))


def commit(pod: Pod, family: Family, now: State, then: State) -> None:
    argv = [family.restore, "--noflush", f"--wait={_LOCK_SECONDS}"]
    with users.owner(pod.netns) as owner:
        _run(pod, argv, transaction(now, then), owner=owner)


def read_sets(pod: Pod) -> dict[str, frozenset[str]]:
    """Return the members of our sets, by name."""
    return sets.parse(_run(pod, ["ipset", "save"], package="ipset"))


def set_names(pod: Pod) -> list[str]:
    """Return the names of our sets."""
    names = _run(pod, ["ipset", "list", "-name"], package="ipset").split()
    return [name for name in names if name.startswith(sets.PREFIX)]


def make_sets(pod: Pod, creation: str) -> None:
    _run(pod, ["ipset", "restore"], creation, package="ipset")


def destroy_sets(pod: Pod, names: Iterable[str]) -> None:
    """Destroy sets that no rule asks any more."""
    for name in names:
        deadline = time.monotonic() + _RELEASE_SECONDS
        while True:
            try:
                _run(pod, ["ipset", "destroy", name], package="ipset")
                break
            except DatapathError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def _run(
    pod: Pod,
    argv: list[str],
    stdin: str = "",
    package: str = "iptables",
    owner: int | None = None,
) -> str:
    """`owner`: the user namespace to run it in, as its root; rules that name users ask for that."""
    program = find_tool(argv[0], package)
    words, environment = [str(program), *argv[1:]], dict[str, str]()
    if owner is not None:
        enter = [str(find_tool("nsenter", "util-linux")), f"--user=/proc/{os.getpid()}/fd/{owner}"]
        words = [*enter, "--setuid=0", "--setgid=0", "--", *words]
        # The node's lock is not for that root to take (iptables-legacy; xtables.lock(8)).
        environment["XTABLES_LOCKFILE"] = "/dev/null"
    try:
        done = run_in(pod.netns, words, stdin, environment=environment)
    except subprocess.TimeoutExpired:
        raise DatapathError(
            f"pod {pod.name}: {argv[0]} hangs; another program may hold the iptables lock"
        ) from None
    except OSError as error:
        raise MachineError(f"pod {pod.name}: cannot run {program}: {error.strerror}") from None
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise DatapathError(f"pod {pod.name}: {argv[0]} refused: {_with_line(reason, stdin)}")
    return done.stdout


def _with_line(reason: str, stdin: str) -> str:
    """Add the text of the line that the program names: its own message shows only a number."""
    number = re.search(r"line:? (\d+)", reason)
    lines = stdin.splitlines()
    if number is None or not 1 <= int(number[1]) <= len(lines):
        return reason
    return f"{reason} ({lines[int(number[1]) - 1]})"
