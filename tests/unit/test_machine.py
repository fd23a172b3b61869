"""What the machine offers, read from prepared tables and trees."""

import os
from pathlib import Path

import pytest

from redirector.errors import MachineError
from redirector.machine import (
    bpffs_mount,
    cgroup2_mount,
    envoy_binary,
    find_tool,
    kernel_headers,
    require_root,
)

HYBRID = """\
23 60 0:22 / /sys rw - sysfs sysfs rw
30 23 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro
31 30 0:28 / /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory
41 30 0:38 /kubepods /mnt/part rw - cgroup2 cgroup2 rw
42 30 0:38 / /sys/fs/cgroup/uni\\040fied rw master:2 shared:3 - cgroup2 cgroup2 rw
"""
BPF = "43 23 0:39 {root} {path} rw,relatime - bpf bpf rw,mode=700\n"


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(HYBRID)
    return path


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o755)
    return path


def header_tree(path: Path) -> Path:
    (path / "include/linux").mkdir(parents=True)
    (path / "include/linux/kconfig.h").touch()
    return path


def test_cgroup2_is_the_mount_of_the_whole_hierarchy(mountinfo: Path) -> None:
    assert cgroup2_mount(mountinfo) == Path("/sys/fs/cgroup/uni fied")


def test_in_a_container_cgroup2_is_the_nodes_own(mountinfo: Path) -> None:
    nodes = "44 30 0:38 /../../.. /host/cgroup rw - cgroup2 cgroup2 rw\n"
    parents = "45 30 0:38 /.. /mnt/parent rw - cgroup2 cgroup2 rw\n"
    mountinfo.write_text(HYBRID + nodes + parents)
    assert cgroup2_mount(mountinfo) == Path("/host/cgroup")


def test_no_cgroup2(mountinfo: Path) -> None:
    mountinfo.write_text("".join(HYBRID.splitlines(keepends=True)[:3]))
    with pytest.raises(MachineError, match="mount -t cgroup2"):
        cgroup2_mount(mountinfo)


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        ([], None),
        ([("/", "/sys/fs/bpf")], "/sys/fs/bpf"),
        ([("/", "/mnt/bpf"), ("/", "/sys/fs/bpf")], "/sys/fs/bpf"),
        ([("/", "/mnt/bpf")], "/mnt/bpf"),
        ([("/part", "/sys/fs/bpf")], None),
    ],
)
def test_bpffs(mountinfo: Path, mounts: list[tuple[str, str]], found: str | None) -> None:
    lines = "".join(BPF.format(root=root, path=path) for root, path in mounts)
    mountinfo.write_text(HYBRID + lines)
    assert bpffs_mount(mountinfo) == (Path(found) if found else None)


def test_envoy_is_the_named_then_the_installed_then_that_of_the_path(tmp_path: Path) -> None:
    named = program(tmp_path / "named")
    installed = program(tmp_path / "installed")
    on_path = program(tmp_path / "bin/envoy")
    variables = {"REDIRECTOR_ENVOY": str(named), "PATH": str(on_path.parent)}
    assert envoy_binary(variables, installed) == named
    del variables["REDIRECTOR_ENVOY"]
    assert envoy_binary(variables, installed) == installed
    installed.unlink()
    assert envoy_binary(variables, installed) == on_path
    on_path.unlink()
    with pytest.raises(MachineError, match=r"installed nor on the PATH; run make setup, or set"):
        envoy_binary(variables, installed)


def test_a_named_envoy_must_be_there(tmp_path: Path) -> None:
    gone = {"REDIRECTOR_ENVOY": str(tmp_path / "gone")}
    with pytest.raises(MachineError, match=r"REDIRECTOR_ENVOY=.*gone: is not a program"):
        envoy_binary(gone, program(tmp_path / "installed"))


def test_headers_are_the_named_then_the_merged_then_the_kernels(tmp_path: Path) -> None:
    named = header_tree(tmp_path / "named")
    merged = tmp_path / "merged"
    modules = tmp_path / "modules"
    own = header_tree(modules / os.uname().release / "build")
    assert kernel_headers({"BCC_KERNEL_SOURCE": str(named)}, merged, modules) == named
    assert kernel_headers({}, merged, modules) == own
    assert kernel_headers({}, header_tree(merged), modules) == merged
    with pytest.raises(MachineError, match=r"BCC_KERNEL_SOURCE=.*gone: has no include/linux/kcon"):
        kernel_headers({"BCC_KERNEL_SOURCE": str(tmp_path / "gone")}, merged, modules)


def test_no_headers(tmp_path: Path) -> None:
    half = tmp_path / "half/include/linux"
    half.mkdir(parents=True)
    with pytest.raises(MachineError, match=r"no kernel headers in .*half; run make setup"):
        kernel_headers({}, tmp_path / "half", tmp_path)


def test_tools_are_found_in_sbin_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_tool("iptables-restore", package="iptables").is_file()
    with pytest.raises(MachineError, match="nonesuch is not installed; install it: apt-get inst"):
        find_tool("nonesuch", package="none")


def test_require_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    require_root()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MachineError, match="needs root, not uid 1000; run it with sudo"):
        require_root()
