"""Pods and records where names are long and files have no room: refused in a line, undone whole."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import traces

from redirector import cli
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.errors import InputError, MachineError
from redirector.lab import LabPod, Node
from redirector.model import Mode
from redirector.records import Records

pytestmark = pytest.mark.root


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few records."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@contextmanager
def full(place: Path) -> Iterator[None]:
    """Until leaving it has no room."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@pytest.mark.parametrize("name", ["a." * 60 + "b", "ns/" + "b" * 236, "x" * 241])
def test_a_name_that_is_too_long_for_a_file_is_refused(
    enrollment: Enrollment, node: Node, name: str
) -> None:
    pod = node.pod("pod")
    with pytest.raises(InputError, match="at most 240"):
        enrollment.enroll(name, pod.netns, pod.cgroup, Mode.EBPF)
    assert enrollment.pods() == []
    assert traces.in_pod(pod) == []


@pytest.mark.parametrize("name", ["a." * 59 + "bcd", "ns/" + "b" * 235, "x" * 240])
def test_the_longest_names_come_and_go(
    enrollment: Enrollment, datapath: Datapath, node: Node, name: str
) -> None:
    pod = node.pod("pod")
    enrollment.enroll(name, pod.netns, pod.cgroup, Mode.EBPF)
    (status,) = enrollment.status()
    assert (status.pod.name, status.missing) == (name, ())
    enrollment.unenroll(name)
    assert traces.in_pod(pod) == []
    assert datapath.pods() == []


@pytest.mark.parametrize("mode", Mode)
def test_a_namespace_that_has_lost_its_name_is_left_clean(
    enrollment: Enrollment, node: Node, mode: Mode
) -> None:
    """Here the name is a process that has ended, as with `ip netns delete`: others live on."""
    pod = node.pod("pod")
    first, second = (pod.popen(["sleep", "1000"]) for _ in range(2))
    enrollment.enroll("pod", Path(f"/proc/{first.pid}/ns/net"), pod.cgroup, mode)
    first.kill()
    first.wait()
    (status,) = enrollment.status()
    assert status.missing
    assert not status.repairable
    enrollment.unenroll("pod")
    assert second.poll() is None
    assert traces.in_pod(pod) == []


def test_without_room_for_records_nothing_is_begun(
    datapath: Datapath, node: Node, small: Path
) -> None:
    pod = node.pod("pod")
    enrollment = Enrollment(Records(small / "pods"), datapath)

    def enroll(pod: LabPod) -> None:
        enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)

    with full(small):
        with pytest.raises(MachineError, match=f"{small}/pods: No space left"):
            enroll(pod)
        assert enrollment.pods() == []
        assert traces.in_pod(pod) == []
    enroll(pod)
    with full(small):
        with pytest.raises(MachineError, match="No space left"):
            enrollment.change_mode("pod", Mode.IPTABLES)
        (status,) = enrollment.status()
        assert (status.pod.mode, status.missing) == (Mode.EBPF, ())
        enrollment.unenroll("pod")
        assert traces.in_pod(pod) == []


def test_a_pod_without_an_address_has_no_bootstrap(
    enrollment: Enrollment,
    datapath: Datapath,
    node: Node,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pod = node.pod("pod")
    for family in ("-4", "-6"):
        pod.run(["ip", family, "address", "flush", "dev", "eth0"], check=True)
    pod.run(["ip", "address", "add", "fe80::7/64", "dev", "eth0"], check=True)
    enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.IPTABLES)
    monkeypatch.setenv(cli.STATE_VARIABLE, str(tmp_path / "pods"))
    monkeypatch.setenv(cli.PINS_VARIABLE, str(datapath.root))
    assert cli.main(["bootstrap", "pod"]) == 2
    assert "had no address of its own when enrolled; give it: --ip" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_told(datapath: Datapath, node: Node, small: Path) -> None:
    pod = node.pod("pod")
    (small / "file").touch()
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    for place in (small / "pods", small / "file", Path("/proc/none/pods")):
        enrollment = Enrollment(Records(place), datapath)
        with pytest.raises(MachineError, match=f"records in {place}: .*; give them a directory"):
            enrollment.enroll("pod", pod.netns, pod.cgroup, Mode.EBPF)
        assert enrollment.status() == []
    assert traces.in_pod(pod) == []
