"""The commands as a user runs them: what they do, say and leave, also when they are wrong."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from unittest import mock

import probes
import pytest
import traces

from redirector import cli
from redirector.bootstrap import bootstrap
from redirector.datapath.hooks import ALL_HOOKS
from redirector.datapath.pins import Datapath
from redirector.lab import LabPod, Node
from redirector.machine import cgroup2_mount, ensure_bpffs
from redirector.network import netns_cookie
from redirector.steering import Verdict

pytestmark = pytest.mark.root

#: What the lab's namespaces have a route to and nobody has.
SERVICE = probes.Call(ip_address("10.96.1.1"), 80)


Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Redirector:
    """The command with records and pins at places of its own."""

    records: Path
    pins: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            cli.STATE_VARIABLE: str(self.records),
            cli.PINS_VARIABLE: str(self.pins),
        }

    def run(
        self,
        *arguments: str | Path,
        within: Sequence[str | Path] = (),
        program: Sequence[str] = ("-m", "redirector.cli"),
    ) -> Done:
        """Run a command as a process; `within` is a program that runs it."""
        return subprocess.run(
            [*within, sys.executable, *program, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def call(self, *arguments: str | Path) -> Done:
        """Run a command in this process: the same without the start of an interpreter."""
        given = [str(part) for part in arguments]
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                code = cli.main(given)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
        return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())

    def do(self, *arguments: str | Path) -> str:
        """Run a command that must succeed; what it prints."""
        return succeeded(self.call(*arguments))

    def left(self, *pods: LabPod) -> list[str]:
        """All that is in the kernel and the files."""
        found = [trace for pod in pods for trace in traces.in_pod(pod)]
        return found + traces.in_files(self.pins, self.records)


@pytest.fixture
def redirector(tmp_path: Path) -> Iterator[Redirector]:
    """With nothing loaded yet."""
    pins = ensure_bpffs() / f"rdrtest-{secrets.token_hex(3)}"
    made = Redirector(tmp_path / "records", pins)
    yield made
    made.run("uninstall")
    Datapath(pins).unload()


@pytest.fixture
def loaded(datapath: Datapath, node: Node, tmp_path: Path) -> Iterator[Redirector]:  # noqa: ARG001
    """With programs loaded that all tests share: never uninstalled, and pods go before the node."""
    datapath.ensure()
    made = Redirector(tmp_path / "records", datapath.root)
    yield made
    for status in json.loads(made.call("status", "-o", "json").stdout):
        made.do("unenroll", status["name"])


@pytest.fixture
def pod(node: Node) -> LabPod:
    return node.pod("pod")


def options(pod: LabPod, **changed: str | Path) -> list[str | Path]:
    """The options of `enroll` for a pod, some of them replaced or added."""
    chosen: dict[str, str | Path] = {"netns": pod.netns, "cgroup": pod.cgroup, "mode": "ebpf"}
    chosen |= {name.replace("_", "-"): value for name, value in changed.items()}
    return [part for name, value in chosen.items() for part in (f"--{name}", value)]


def succeeded(done: Done) -> str:
    assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
    return done.stdout


def refused(done: Done, code: int, *told: str) -> str:
    """The one line that a wrong command says: who speaks, and all that the user must know."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("redirector: "), line
    for part in told:
        assert part in line, f"{part!r} is not in {line!r}"
    return line


@pytest.mark.parametrize("first", ["ebpf", "iptables"])
def test_a_pod_by_hand_from_enroll_to_uninstall(
    redirector: Redirector, pod: LabPod, first: str
) -> None:
    def do(*arguments: str | Path) -> str:
        return succeeded(redirector.run(*arguments))

    other = {"ebpf": "iptables", "iptables": "ebpf"}[first]
    probes.start(pod, [(Verdict.OUTBOUND, 15001)], sidecar=True)

    def arrives() -> bool:
        (outcome,) = pod.call(probes.dial, [SERVICE])
        if not isinstance(outcome, probes.Arrival):
            return False
        assert (outcome.destination, outcome.port) == (SERVICE.destination, SERVICE.port)
        return True

    def told() -> tuple[str, list[str]]:
        (status,) = json.loads(do("status", "-o", "json"))
        assert status["name"] == "demo/pod"
        return status["mode"], status["missing"]

    assert do("status") == "no pod enrolled\n"
    assert not arrives()
    said = do("enroll", "demo/pod", *options(pod, mode=first))
    assert said == f"pod demo/pod enrolled in {first} mode\n"
    assert arrives()
    assert told() == (first, [])
    assert do("mode", "demo/pod", other) == f"pod demo/pod is in {other} mode\n"
    assert arrives()
    assert told() == (other, [])
    text = do("status")
    assert text.startswith(f"demo/pod  {other}  {pod.ip} {pod.ip6}")
    assert do("unenroll", "demo/pod") == "pod demo/pod unenrolled\n"
    assert not arrives()
    assert traces.in_pod(pod) == []

    do("enroll", "demo/pod", *options(pod, mode=first))
    assert arrives()
    for _ in range(2):
        assert do("uninstall") == "nothing of redirector is left\n"
        assert redirector.left(pod) == []
        assert not arrives()


def test_uninstall_where_nothing_ever_was(redirector: Redirector) -> None:
    assert redirector.do("uninstall") == "nothing of redirector is left\n"
    assert not redirector.records.exists()


@contextlib.contextmanager
def short_lived(pod: LabPod) -> Iterator[tuple[Path, Path]]:
    """A namespace with an address, and a cgroup; both are gone on leaving, as a deleted pod's."""
    netns, cgroup = Path(f"/run/netns/{pod.name}-short"), pod.cgroup.with_name("short")
    subprocess.run(["ip", "netns", "add", netns.name], check=True)
    try:
        cgroup.mkdir()
        address = ["ip", "-n", netns.name, "address", "add", "10.99.0.1/32", "dev", "lo"]
        subprocess.run(address, check=True)
        yield netns, cgroup
    finally:
        subprocess.run(["ip", "netns", "delete", netns.name], check=True)
        cgroup.rmdir()


def test_uninstall_removes_what_is_whole_when_something_is_not(
    redirector: Redirector, node: Node
) -> None:
    """A record that cannot be read, a pod that is gone, and one that is there."""
    damaged, whole = node.pod("damaged"), node.pod("whole")
    with short_lived(whole) as (netns, cgroup):
        redirector.do("enroll", "gone", *options(whole, netns=netns, cgroup=cgroup))
    redirector.do("enroll", "whole", *options(whole, mode="iptables"))
    redirector.do("enroll", "damaged", *options(damaged))
    record = redirector.records / "damaged.json"
    record.write_text("{}")
    refused(redirector.call("uninstall"), 1, str(record), "chains REDIRECTOR_* and")
    assert redirector.left(damaged, whole) == []
    assert redirector.do("uninstall") == "nothing of redirector is left\n"


@pytest.mark.parametrize("left", ["", "{}", "half"])
def test_a_damaged_record_is_told_and_hinders_no_other_pod(
    loaded: Redirector, node: Node, datapath: Datapath, left: str
) -> None:
    damaged, whole = node.pod("damaged"), node.pod("whole")
    for name, lab in (("a/damaged", damaged), ("whole", whole)):
        loaded.do("enroll", name, *options(lab), "--exclude-outbound-ip-ranges", "10.96.0.0/16")
    cookie = netns_cookie(damaged.netns)
    record = loaded.records / "a%2fdamaged.json"
    half = left == "half"
    if half:
        left = json.dumps(json.loads(record.read_text()) | {"steering": None})
    record.write_text(left)
    for command in (["status"], ["takeover"]):
        done = loaded.call(*command)
        assert done.returncode == 1, command
        assert f"{record}: is not a record" in done.stdout + done.stderr, command
        assert "redirector unenroll a/damaged" in done.stdout + done.stderr, command
    assert "whole" in loaded.call("status").stdout
    assert "whole" in loaded.do("metrics")
    loaded.do("flows")
    for mode in ("iptables", "ebpf"):
        loaded.do("mode", "whole", mode)
    refused(loaded.call("mode", "a/damaged", "ebpf"), 4, str(record))
    refused(loaded.call("enroll", "second", *options(damaged)), 4, str(record))
    refused(loaded.call("unenroll", "none"), 2, "enrolled are: a/damaged, whole")
    loaded.do("unenroll", "whole")
    loaded.do("enroll", "whole", *options(whole))

    done = loaded.call("unenroll", "a/damaged")
    assert done.returncode == (0 if half else 4), done.stderr
    assert traces.in_pod(damaged) == []
    assert datapath.maps.pod(cookie) is None
    # What the damaged record told of excluded ranges is forgotten, too.
    others = ("--exclude-outbound-ip-ranges", "10.97.0.0/16")
    loaded.do("enroll", "a/damaged", *options(damaged), *others)
    probes.start(damaged, [(Verdict.OUTBOUND, 15001)], sidecar=True)
    (outcome,) = damaged.call(probes.dial, [SERVICE])
    assert isinstance(outcome, probes.Arrival), outcome
    loaded.do("status")


def test_unenroll_of_a_pod_that_is_gone(
    loaded: Redirector, pod: LabPod, datapath: Datapath
) -> None:
    with short_lived(pod) as (netns, cgroup):
        loaded.do("enroll", "pod", *options(pod, netns=netns, cgroup=cgroup))
    assert loaded.call("status").returncode == 1
    loaded.do("unenroll", "pod")
    assert "pod" not in datapath.pods()


def test_status_tells_what_is_missing_and_how_to_repair_it(
    loaded: Redirector, pod: LabPod, datapath: Datapath
) -> None:
    loaded.do("enroll", "pod", *options(pod))
    datapath.detach("pod", "connect4")
    done = loaded.call("status")
    assert done.returncode == 1
    assert "INCOMPLETE: lacks connect4; repair: redirector mode pod ebpf" in done.stdout
    loaded.do("mode", "pod", "ebpf")
    assert "INCOMPLETE" not in loaded.do("status")


def test_bootstrap_needs_no_root_and_no_enrolment(redirector: Redirector) -> None:
    given = ("bootstrap", "web", "--namespace", "demo", "--ip", "10.0.0.7")
    assert json.loads(redirector.do(*given)) == bootstrap(
        "web",
        "demo",
        "10.0.0.7",
        xds="unix:/run/redirector/xds.sock",
        admin_port=15000,
        ready_port=15021,
        stats_port=15090,
    )
    assert redirector.left() == []


def test_bootstrap_knows_the_address_of_an_enrolled_pod(loaded: Redirector, pod: LabPod) -> None:
    loaded.do("enroll", "demo/web", *options(pod))
    made = json.loads(loaded.do("bootstrap", "demo/web"))
    assert made["node"]["id"].startswith(f"sidecar~{pod.ip}~web.demo~")


WRONG_OPTIONS: dict[str, tuple[dict[str, str], list[str]]] = {
    "netns-absent": (
        {"netns": "/run/netns/rdr-absent"},
        ["netns /run/netns/rdr-absent: No such file", "give a path such as /run/netns/NAME"],
    ),
    "netns-plain-file": (
        {"netns": "/etc/passwd"},
        ["netns /etc/passwd: is not a network namespace", "give a path such as"],
    ),
    "netns-directory": ({"netns": "/run"}, ["netns /run: is not a network namespace"]),
    "netns-other-kind": (
        {"netns": "/proc/self/ns/uts"},
        ["netns /proc/self/ns/uts: is not a network namespace"],
    ),
    "cgroup-absent": (
        {"cgroup": "{mount}/rdr-absent"},
        ["cgroup {mount}/rdr-absent: does not exist", "give a pod's directory below {mount}"],
    ),
    "cgroup-not-cgroup2": ({"cgroup": "/tmp"}, ["cgroup /tmp: is not a cgroup2 directory"]),
    "cgroup-a-file": (
        {"cgroup": "{cgroup}/cgroup.procs"},
        ["{cgroup}/cgroup.procs: is not a cgroup2 directory"],
    ),
    "cgroup-root": ({"cgroup": "{mount}"}, ["cgroup {mount}: is the root of all processes"]),
    "cgroup-root-by-dots": (
        {"cgroup": "{cgroup}/../.."},
        ["cgroup {mount}: is the root of all processes"],
    ),
    "cgroup-root-by-link": (
        {"cgroup": "{link}"},
        ["cgroup {mount}: is the root of all processes"],
    ),
    "mode": ({"mode": "tproxy"}, ["--mode", "'tproxy'", "'ebpf', 'iptables'"]),
    "port": (
        {"exclude_outbound_ports": "443,70000"},
        ["--exclude-outbound-ports: '70000' is not a port", "from 1 to 65535"],
    ),
    "port-word": ({"include_inbound_ports": "http"}, ["--include-inbound-ports: 'http'"]),
    "same-ports": (
        {"outbound_port": "15006"},
        ["--outbound-port and --inbound-port are both 15006", "a port each"],
    ),
    "cidr": (
        {"include_outbound_ip_ranges": "10.0.0.0/33"},
        ["--include-outbound-ip-ranges: '10.0.0.0/33' is not an IP range", "such as 10.0.0.0/8"],
    ),
    "cidr-host-bits": (
        {"exclude_outbound_ip_ranges": "10.1.0.0/8"},
        ["--exclude-outbound-ip-ranges: '10.1.0.0/8'", "write 10.0.0.0/8"],
    ),
    "too-many-uids": (
        {"proxy_uid": "1,2,3,4,5"},
        ["pod wrong: proxyUID", "1,2,3,4,5: at most 4", "use --mode iptables"],
    ),
    "unknown-option": ({"exclude_everything": "yes"}, ["--exclude-everything"]),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_told_and_change_nothing(
    loaded: Redirector, pod: LabPod, tmp_path: Path, case: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to(cgroup2_mount())
    known = {"mount": cgroup2_mount(), "cgroup": pod.cgroup, "link": link}
    changed, told = WRONG_OPTIONS[case]
    given = {name: value.format(**known) for name, value in changed.items()}
    done = loaded.call("enroll", "wrong", *options(pod, **given))
    refused(done, 2, *(part.format(**known) for part in told))
    assert traces.in_pod(pod) == []
    assert json.loads(loaded.do("status", "-o", "json")) == []


WRONG_COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "mode-of-unknown-pod": (
        ["mode", "absent", "ebpf"],
        ["pod absent: is not enrolled; enrolled are: pod"],
    ),
    "unenroll-unknown-pod": (
        ["unenroll", "absent"],
        ["pod absent: is not enrolled; enrolled are: pod"],
    ),
    "unknown-mode": (["mode", "pod", "tproxy"], ["'tproxy'", "'ebpf', 'iptables'"]),
    "no-such-command": (["enrol"], ["'enrol'", "enroll"]),
    "no-command": ([], ["COMMAND"]),
    "option-without-value": (["enroll", "x", "--netns"], ["--netns"]),
    "option-forgotten": (["enroll", "x"], ["--netns", "--cgroup", "--mode"]),
    "bootstrap-ip": (["bootstrap", "x", "--ip", "10.0.0.300"], ["ip", "'10.0.0.300'"]),
    "bootstrap-xds": (
        ["bootstrap", "x", "--ip", "10.0.0.3", "--xds", "unix:relative"],
        ["xds", "'unix:relative'", "use unix:/path"],
    ),
    "bootstrap-port": (
        ["bootstrap", "x", "--ip", "10.0.0.3", "--admin-port", "70000"],
        ["admin port", "70000", "0-65535"],
    ),
}


def test_wrong_commands_are_told_and_change_nothing(loaded: Redirector, node: Node) -> None:
    pod, free = node.pod("pod"), node.pod("free")
    loaded.do("enroll", "pod", *options(pod))
    before = traces.in_pod(pod)
    assert len(before) == len(ALL_HOOKS)
    for given, told in WRONG_COMMANDS.values():
        refused(loaded.call(*given), 2, *told)
    for name in ("", "a b", "../../etc", "-", "a/b/c", "a\nb"):
        refused(loaded.call("enroll", *options(free), "--", name), 2, "not a name; use letters")
    refused(
        loaded.call("enroll", "pod", *options(free)),
        2,
        "pod pod: enrolled already in ebpf mode",
        "'redirector mode pod MODE'",
        "'redirector unenroll pod'",
    )
    refused(
        loaded.call("enroll", "second", *options(pod)),
        2,
        f"netns {pod.netns} is enrolled already as pod pod",
        "'redirector unenroll pod'",
    )
    assert traces.in_pod(free) == []
    assert traces.in_pod(pod) == before
    assert [status["name"] for status in json.loads(loaded.do("status", "-o", "json"))] == ["pod"]


def test_a_mode_that_cannot_hold_the_pod_leaves_it_in_the_other(
    loaded: Redirector, pod: LabPod
) -> None:
    """More users than the programs have room for."""
    loaded.do("enroll", "pod", *options(pod, mode="iptables", proxy_uid="1,2,3,4,5"))
    before = traces.in_pod(pod)
    refused(loaded.call("mode", "pod", "ebpf"), 2, "proxyUID", "1,2,3,4,5")
    assert traces.in_pod(pod) == before
    (status,) = json.loads(loaded.do("status", "-o", "json"))
    assert (status["mode"], status["missing"]) == ("iptables", [])


AS_NOBODY = """
import os, sys
from redirector import cli, config  # its rooms, while the clone can be read
os.seteuid(65534)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["enroll", "mode", "unenroll", "status", "uninstall"])
def test_without_root_a_command_says_so(redirector: Redirector, pod: LabPod, command: str) -> None:
    given: dict[str, list[str | Path]] = {
        "enroll": ["pod", *options(pod)],
        "mode": ["pod", "ebpf"],
        "unenroll": ["pod"],
    }
    done = redirector.run(command, *given.get(command, []), program=("-c", AS_NOBODY))
    refused(done, 3, "needs root, not uid 65534", "sudo")
    assert redirector.left(pod) == []


def without(kind: str, *more: str) -> list[str]:
    """A program that runs another where file systems of a kind are not mounted."""
    script = (
        f"awk '/ - {kind} /{{print $5}}' /proc/self/mountinfo |"
        ' while read -r where; do umount -l "$where"; done; exec "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, "sh", *more]


def test_without_cgroup2_enroll_says_so(redirector: Redirector, pod: LabPod) -> None:
    done = redirector.run("enroll", "pod", *options(pod), within=without("cgroup2"))
    refused(done, 3, "cgroup2 is not mounted", "mount it: mount -t cgroup2")
    assert redirector.left(pod) == []


@pytest.mark.parametrize("command", ["enroll", "uninstall"])
def test_pins_outside_of_a_bpffs_are_refused(
    redirector: Redirector, pod: LabPod, tmp_path: Path, command: str
) -> None:
    """Uninstalling removes that directory, so it must not be somebody's own."""
    given = ["pod", *options(pod)] if command == "enroll" else []
    (tmp_path / "precious").touch()
    for pins in (tmp_path, redirector.pins.parent):
        wrong = replace(redirector, pins=pins)
        refused(wrong.call(command, *given), 3, f"{pins}: is not below a bpffs", "mount -t bpf")
    assert (tmp_path / "precious").exists()
    assert redirector.left(pod) == []


def test_without_bpffs_enroll_says_so(redirector: Redirector, pod: LabPod) -> None:
    done = redirector.run("enroll", "pod", *options(pod), within=without("bpf"))
    refused(done, 3, f"{redirector.pins}: is not below a bpffs", "mount -t bpf bpf /sys/fs/bpf")
    assert redirector.left(pod) == []


def test_bpffs_that_may_not_be_mounted_is_told(redirector: Redirector, pod: LabPod) -> None:
    """Root in a container that lacks CAP_SYS_ADMIN."""
    bare = without("bpf", "setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")
    environment = {**redirector.environment}
    del environment[cli.PINS_VARIABLE]
    done = subprocess.run(
        [*bare, sys.executable, "-m", "redirector.cli", "enroll", "pod", *options(pod)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    refused(done, 3, "bpffs is not mounted and cannot be", "mount -t bpf bpf /sys/fs/bpf")
    assert redirector.left(pod) == []


def killed_while_enrolling(redirector: Redirector, pod: LabPod, mode: str, after_s: float) -> bool:
    """Whether `enroll` was still at work when SIGKILL came."""
    context = multiprocessing.get_context("fork")
    arguments = ("enroll", "pod", *options(pod, mode=mode))
    child = context.Process(target=redirector.call, args=arguments)
    child.start()
    child.join(after_s)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def loaders(redirector: Redirector) -> list[str]:
    """Programs that still compile and load for these pins."""
    found = subprocess.run(["pgrep", "-f", f"loader {redirector.pins}"], capture_output=True)
    return found.stdout.decode().split()


@pytest.mark.parametrize("mode", ["ebpf", "iptables"])
def test_enroll_killed_at_any_moment_leaves_nothing_that_cannot_be_removed(
    redirector: Redirector, pod: LabPod, mode: str
) -> None:
    def timed() -> float:
        started = time.monotonic()
        redirector.do("enroll", "pod", *options(pod, mode=mode))
        taken = time.monotonic() - started
        redirector.do("unenroll", "pod")
        return taken

    chance = random.Random(mode)
    with_loading_s, loaded_s = timed(), timed()
    redirector.do("uninstall")
    killed = 0
    for n in range(12):
        to_load = n % 3 == 0
        longest_s = with_loading_s if to_load else loaded_s
        killed += killed_while_enrolling(redirector, pod, mode, longest_s * chance.random())
        if n % 3 == 1:
            # The killed one had either come to its record or changed nothing yet.
            done = redirector.call("enroll", "pod", *options(pod, mode=mode))
            if done.returncode:
                refused(done, 2, "pod pod: enrolled already")
                redirector.do("mode", "pod", mode)
            assert "INCOMPLETE" not in redirector.do("status")
        if n % 3 == 2:
            assert redirector.do("uninstall") == "nothing of redirector is left\n"
            assert loaders(redirector) == []
            assert redirector.left(pod) == []
        elif redirector.call("unenroll", "pod").returncode == 0:
            assert traces.in_pod(pod) == []
    assert killed, "every enroll was done before it was killed"
