"""`redirector check` on prepared machines."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from redirector.check import CHECKS, Environment, Status, findings, run
from redirector.datapath.layout import Defect
from redirector.datapath.selftest import LINES
from redirector.errors import DatapathError, MachineError
from redirector.machine import envoy_binary

ALL_CAPABILITIES = 0x1FFFFFFFFFF
MOUNTS = """\
41 30 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
43 23 0:39 / /sys/fs/bpf rw - bpf bpf rw
"""


def execute(argv: Sequence[str], stdin: str) -> str:
    """A machine where every program works."""
    if argv[-1] == "--version":
        return "envoy  version: 0123abcd/1.40.0/Clean/RELEASE/BoringSSL\n"
    return "0.26.0\n" if not stdin else ""


@pytest.fixture
def good(tmp_path: Path) -> Environment:
    """A machine that lacks nothing."""
    proc, sys, headers = tmp_path / "proc", tmp_path / "sys", tmp_path / "headers"
    for directory in (proc / "self/net", sys / "kernel/btf", sys / "fs/bpf"):
        directory.mkdir(parents=True)
    (headers / "include/linux").mkdir(parents=True)
    (headers / "include/linux/kconfig.h").touch()
    (proc / "net").symlink_to("self/net")
    (proc / "net/if_inet6").touch()
    (proc / "self/status").write_text(f"Name:\tx\nCapEff:\t{ALL_CAPABILITIES:016x}\nSeccomp:\t0\n")
    (proc / "self/mountinfo").write_text(MOUNTS)
    (sys / "kernel/btf/vmlinux").touch()
    variables = {"BCC_KERNEL_SOURCE": str(headers), "REDIRECTOR_ENVOY": str(envoy_binary())}
    return Environment(
        0, "6.1.0-30-amd64", variables, proc, sys, execute, lambda: 4711, lambda: Defect(0)
    )


def not_ok(environment: Environment) -> dict[str, str]:
    return {f.name: f.text for f in findings(environment) if f.status is not Status.OK}


def test_a_good_machine(good: Environment) -> None:
    out = io.StringIO()
    assert run(out, good) == 0
    lines = out.getvalue().splitlines()
    assert len(lines) == len(CHECKS) + len(LINES)
    assert all(line.startswith("ok ") for line in lines)
    assert (
        "ok       kernel                   Linux 6.1.0-30-amd64 (5.15 or newer is needed)" in lines
    )
    assert f"ok       Envoy                    1.40.0 {envoy_binary()}" in lines


def test_what_is_missing_sets_the_exit_code(good: Environment) -> None:
    out = io.StringIO()
    assert run(out, replace(good, release="5.10.0-8-amd64")) == MachineError.exit_code
    assert (
        "missing  kernel                   Linux 5.10.0-8-amd64 is too old; boot 5.15 or newer"
        in (out.getvalue())
    )
    assert "\n1 missing; each line above says what to do\n" in out.getvalue()


@pytest.mark.parametrize("release", ["5.15.0", "6.0", "10.2-rc1"])
def test_kernels_that_will_do(good: Environment, release: str) -> None:
    assert not_ok(replace(good, release=release)) == {}


def test_no_root(good: Environment) -> None:
    found = not_ok(replace(good, euid=1000))
    assert found.keys() == {"root", "iptables", "ip6tables", "ipset"}
    assert found["root"] == "this is uid 1000; run it with sudo"


def test_a_container_without_capabilities(good: Environment) -> None:
    lacking = ALL_CAPABILITIES & ~(1 << 39)
    (good.proc / "self/status").write_text(f"CapEff:\t{lacking:016x}\n")
    assert not_ok(good)["capabilities"].startswith("this process lacks CAP_BPF; run it as root")


def test_an_old_or_small_kernel(good: Environment) -> None:
    def no_cookie() -> int:
        raise MachineError("the kernel does not tell")

    (good.sys / "kernel/btf/vmlinux").unlink()
    (good.sys / "fs/bpf").rmdir()
    (good.proc / "self/mountinfo").write_text("")
    found = not_ok(replace(good, cookie=no_cookie))
    assert found.keys() == {"BTF", "cgroup2", "bpffs", "netns cookie"}
    assert "CONFIG_DEBUG_INFO_BTF=y" in found["BTF"]


def test_bpffs_that_can_be_mounted_is_fine(good: Environment) -> None:
    (good.proc / "self/mountinfo").write_text(MOUNTS.splitlines()[0] + "\n")
    (bpffs,) = (f for f in findings(good) if f.name == "bpffs")
    assert bpffs.status is Status.OK
    assert "the first enrolment mounts it" in bpffs.text


def test_programs_that_do_not_work(good: Environment) -> None:
    def broken(argv: Sequence[str], stdin: str) -> str:
        if argv[-1] == "--version":
            return "iptables-restore v1.8.9 (legacy)\n"
        raise MachineError("No chain/target/match by that name" if stdin else "No module named bcc")

    found = not_ok(replace(good, execute=broken))
    assert found.keys() == {"bcc", "iptables", "ip6tables", "ipset", "Envoy"}
    assert found["ipset"].endswith("lists of more than 32 rules need --mode ebpf")
    assert "(legacy) does not take our rules: No chain/target/match" in found["iptables"]
    assert "(No module named bcc); apt-get install python3-bpfcc" in found["bcc"]


def test_without_ipv6_there_is_nothing_to_want_of_ip6tables(good: Environment) -> None:
    def only_ipv4(argv: Sequence[str], stdin: str) -> str:
        if any("ip6tables" in word for word in argv):
            raise MachineError("no IPv6")
        return execute(argv, stdin)

    assert "ip6tables" in not_ok(replace(good, execute=only_ipv4))
    (good.proc / "net/if_inet6").unlink()
    assert not_ok(replace(good, execute=only_ipv4)) == {}


def test_what_only_demo_and_comparison_need_is_a_warning(
    good: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent's image has neither."""

    def without_luajit(name: str, package: str) -> Path:
        if name == "luajit":
            raise MachineError(f"apt-get install {package}")
        return Path("/usr/sbin") / name

    monkeypatch.setattr("redirector.machine.find_tool", without_luajit)
    out = io.StringIO()
    assert run(out, replace(good, variables={**good.variables, "REDIRECTOR_ENVOY": "/no"})) == 0
    assert "warn     luajit                   apt-get install luajit" in out.getvalue()
    assert "warn     Envoy                    REDIRECTOR_ENVOY=/no: is not a program" in (
        out.getvalue()
    )


def test_a_kernel_that_is_wrong_about_redirected_bytes(good: Environment) -> None:
    """It steers all the same, so nothing is missing."""
    out = io.StringIO()
    wrong = Defect.FIONREAD | Defect.SPLICE_OUT
    assert run(out, replace(good, self_test=lambda: wrong)) == 0
    lines = out.getvalue().splitlines()
    fionread, splice = (line for line in lines if line.startswith("FAILED"))
    assert "FIONREAD, redirected" in fionread
    assert "splice() out of it" in splice
    assert "with its BPF LSM on" in splice
    for line in (fionread, splice):
        assert line.endswith("; --accelerate auto steers without short-circuit on this kernel")


def test_programs_that_do_not_load(good: Environment) -> None:
    def refuse() -> Defect:
        raise DatapathError("the kernel or compiler refused the programs: E2BIG")

    found = not_ok(replace(good, self_test=refuse))
    assert found == {"self-test": "the kernel or compiler refused the programs: E2BIG"}
