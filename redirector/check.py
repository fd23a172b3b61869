"""`redirector check`: what this machine can do, a line each, and what to do about the rest.

A check returns what it found or raises MachineError with the way out. It changes nothing: rules
and programs are tried in network namespaces that end with who tries them.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from typing import TextIO

from redirector import machine
from redirector.datapath.layout import Defect
from redirector.datapath.loading import run_self_test
from redirector.datapath.selftest import LINES
from redirector.errors import MachineError, RedirectorError
from redirector.model import Mode, Pod
from redirector.modes.iptables.sets import MOST_RULES, creation, networks_set
from redirector.modes.iptables.tables import IPV4, IPV6, Family
from redirector.modes.iptables.transaction import restore_text
from redirector.network import own_netns_cookie

OLDEST_KERNEL = (5, 15)
#: Bits of CapEff (linux/capability.h).
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_BPF": 39}
_BCC = "import bcc; bcc.BPF; print(bcc.__version__)"
_TIMEOUT = 20.0
SELF_TEST = "self-test"


class Status(StrEnum):
    """How a check went; only MISSING makes the whole fail.

    FAILED is a line of the kernel's self-test: pods are steered without short-circuit then.
    """

    OK = "ok"
    WARN = "warn"
    FAILED = "FAILED"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    name: str
    status: Status
    text: str


def execute(argv: Sequence[str], stdin: str) -> str:
    """Run a program and return what it prints; MachineError with its complaint when it fails."""
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
    except subprocess.CalledProcessError as error:
        complaint = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise MachineError(f"{Path(argv[0]).name}: {complaint}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{Path(argv[0]).name}: {error}") from None
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """The machine that is checked."""

    euid: int
    release: str
    variables: Mapping[str, str]
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    execute: Callable[[Sequence[str], str], str] = execute
    cookie: Callable[[], int] = own_netns_cookie
    self_test: Callable[[], Defect] = run_self_test


def this_machine() -> Environment:
    """Return the machine that we run on."""
    return Environment(os.geteuid(), platform.release(), os.environ)


@dataclass(frozen=True)
class Check:
    """One question to the machine. What only some uses need is not `required`.

    `to_load`: without it no program can be loaded.
    """

    name: str
    probe: Callable[[Environment], str]
    required: bool = True
    to_load: bool = False


def findings(environment: Environment) -> Iterator[Finding]:
    """Yield the answers, in order, each as soon as it is known."""
    ready = True
    for check in CHECKS:
        try:
            yield Finding(check.name, Status.OK, check.probe(environment))
        except MachineError as error:
            status = Status.MISSING if check.required else Status.WARN
            ready = ready and not check.to_load
            yield Finding(check.name, status, str(error))
    yield from _self_test(environment, ready)


def _self_test(environment: Environment, ready: bool) -> Iterator[Finding]:
    """What the kernel does with redirected bytes, a line each; where programs can be loaded."""
    if not ready:
        return
    try:
        found = environment.self_test()
    except RedirectorError as error:
        yield Finding(SELF_TEST, Status.MISSING, str(error))
        return
    for line in LINES:
        if not found & line.defect:
            yield Finding(line.name, Status.OK, line.passes)
        else:
            text = f"{line.meaning}; --accelerate auto steers without short-circuit on this kernel"
            yield Finding(line.name, Status.FAILED, text)


def line(finding: Finding) -> str:
    """Return a finding as the user sees it."""
    names = [check.name for check in CHECKS] + [line.name for line in LINES]
    width = max(map(len, names))
    return f"{finding.status:<7}  {finding.name:<{width}}  {finding.text}"


def run(out: TextIO, environment: Environment | None = None) -> int:
    """Print all findings; return 0, or MachineError's exit code when something is missing."""
    missing = 0
    for finding in findings(environment or this_machine()):
        print(line(finding), file=out, flush=True)
        missing += finding.status is Status.MISSING
    if missing:
        print(f"\n{missing} missing; each line above says what to do", file=out)
    return MachineError.exit_code if missing else 0


def _root(env: Environment) -> str:
    if env.euid != 0:
        raise MachineError(f"this is uid {env.euid}; run it with sudo")
    return "uid 0"


def _capabilities(env: Environment) -> str:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", (env.proc / "self/status").read_text(), re.M)
    effective = int(found[1], 16) if found else 0
    lacking = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        raise MachineError(
            f"this process lacks {', '.join(lacking)}; run it as root; a container needs what "
            "manifests/agent/daemonset.yaml grants"
        )
    return ", ".join(CAPABILITIES)


def _kernel(env: Environment) -> str:
    found = re.match(r"(\d+)\.(\d+)", env.release)
    oldest = ".".join(map(str, OLDEST_KERNEL))
    if found is None or (int(found[1]), int(found[2])) < OLDEST_KERNEL:
        raise MachineError(f"Linux {env.release} is too old; boot {oldest} or newer")
    return f"Linux {env.release} ({oldest} or newer is needed)"


def _btf(env: Environment) -> str:
    path = env.sys / "kernel/btf/vmlinux"
    if not path.is_file():
        raise MachineError(f"{path} is not there; boot a kernel with CONFIG_DEBUG_INFO_BTF=y")
    return str(path)


def _cgroup2(env: Environment) -> str:
    return str(machine.cgroup2_mount(env.proc / "self/mountinfo"))


def _bpffs(env: Environment) -> str:
    mounted = machine.bpffs_mount(env.proc / "self/mountinfo")
    if mounted is not None:
        return str(mounted)
    directory = env.sys / "fs/bpf"
    if not directory.is_dir():
        raise MachineError(f"{directory} is not there; boot a kernel with CONFIG_BPF_SYSCALL=y")
    return f"not mounted; the first enrolment mounts it at {directory}"


def _cookie(env: Environment) -> str:
    env.cookie()
    return "the kernel tells network namespaces apart"


def _headers(env: Environment) -> str:
    return str(machine.kernel_headers(env.variables))


def _bcc(env: Environment) -> str:
    try:
        return env.execute([sys.executable, "-c", _BCC], "").strip()
    except MachineError as error:
        reason = str(error).rsplit("Traceback", 1)[-1].rsplit(": ", 1)[-1]
        raise MachineError(
            f"Python cannot import bcc ({reason}); apt-get install python3-bpfcc and make the"
            " virtual environment with /usr/bin/python3 -m venv --system-site-packages"
        ) from None


def _iptables(family: Family) -> Callable[[Environment], str]:
    def probe(env: Environment) -> str:
        if family is IPV6 and not (env.proc / "net/if_inet6").exists():
            return "not needed: this kernel runs without IPv6"
        restore = str(machine.find_tool(family.restore, package="iptables"))
        unshare = str(machine.find_tool("unshare", package="util-linux"))
        version = env.execute([restore, "--version"], "").strip()
        if env.euid != 0:
            raise MachineError(f"{version}: only root can try whether it works; run it with sudo")
        # The rules themselves, in a namespace of their own: each match and target is tried.
        pod = Pod("check", Path(), Path(), Mode.IPTABLES)
        try:
            env.execute([unshare, "--net", restore], restore_text(pod, family))
        except MachineError as error:
            raise MachineError(
                f"{version} does not take our rules: {error}; load the kernel's NAT modules or"
                " switch flavour: update-alternatives --config iptables"
            ) from None
        return version

    return probe


def _ipset(env: Environment) -> str:
    """What the iptables mode needs for long lists only."""
    hint = f"without it, lists of more than {MOST_RULES} rules need --mode ebpf"
    try:
        ipset = str(machine.find_tool("ipset", package="ipset"))
        unshare = str(machine.find_tool("unshare", package="util-linux"))
        iptables = str(machine.find_tool("iptables", package="iptables"))
        version = env.execute([ipset, "--version"], "").partition(",")[0].strip()
        if env.euid != 0:
            raise MachineError(f"{version}: only root can try whether it works; run it with sudo")
        asks = networks_set(4, [ip_network("10.0.0.0/8")])
        script = f'"$1" restore && "$2" -A OUTPUT {asks.match}'
        env.execute(
            [unshare, "--net", "sh", "-c", script, "sh", ipset, iptables], creation([asks], {})
        )
    except MachineError as error:
        raise MachineError(f"{error}; {hint}") from None
    return version


def _envoy(env: Environment) -> str:
    """What demo and comparison start; sidecars bring their own."""
    try:
        binary = machine.envoy_binary(env.variables)
    except MachineError as error:
        raise MachineError(f"{error}; only demo and compare need one here") from None
    found = re.search(r"/(\d+\.\d+\.\d+[^/]*)/", env.execute([str(binary), "--version"], ""))
    if found is None:
        raise MachineError(f"{binary} does not tell an Envoy version; run make setup")
    return f"{found[1]} {binary}"


def _luajit(_env: Environment) -> str:
    """What the comparison's load runs on."""
    return str(machine.find_tool("luajit", "luajit"))


CHECKS: tuple[Check, ...] = (
    Check("root", _root, to_load=True),
    Check("capabilities", _capabilities, to_load=True),
    Check("kernel", _kernel, to_load=True),
    Check("BTF", _btf),
    Check("cgroup2", _cgroup2),
    Check("bpffs", _bpffs),
    Check("netns cookie", _cookie),
    Check("kernel headers", _headers, to_load=True),
    Check("bcc", _bcc, to_load=True),
    Check("iptables", _iptables(IPV4)),
    Check("ip6tables", _iptables(IPV6)),
    Check("ipset", _ipset, required=False),
    Check("Envoy", _envoy, required=False),
    Check("luajit", _luajit, required=False),
)
