"""A pod's cgroup is found in every layout that kubelets make."""

from pathlib import Path

import pytest

from redirector.kubernetes.places import Places

UID = "0a1b2c3d-1111-2222-3333-444455556666"
UNDERSCORED = UID.replace("-", "_")


@pytest.mark.parametrize(
    "directory",
    [
        f"kubepods.slice/kubepods-pod{UNDERSCORED}.slice",
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice",
        f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORED}.slice",
        f"kubepods/pod{UID}",
        f"kubepods/burstable/pod{UID}",
        f"kubepods/besteffort/pod{UID}",
        "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/"
        f"kubelet-kubepods-burstable-pod{UNDERSCORED}.slice",
        f"kubelet/kubepods/burstable/pod{UID}",
    ],
)
def test_layouts(tmp_path: Path, directory: str) -> None:
    (tmp_path / directory / "cri-containerd-1.scope").mkdir(parents=True)
    (tmp_path / "system.slice" / f"pod{UID}").mkdir(parents=True)
    places = Places(tmp_path)
    assert places.cgroup(UID) == tmp_path / directory
    assert places.cgroup("0" + UID[1:-1] + "7") is None


def test_a_pod_that_comes_later_and_goes(tmp_path: Path) -> None:
    places = Places(tmp_path)
    assert places.cgroup(UID) is None
    made = tmp_path / "kubepods" / f"pod{UID}"
    made.mkdir(parents=True)
    assert places.cgroup(UID) == made
    made.rmdir()
    assert places.cgroup(UID) is None


def test_a_static_pods_uid_has_no_dashes(tmp_path: Path) -> None:
    made = tmp_path / "kubepods" / "burstable" / "pod0123456789abcdef0123456789abcdef"
    made.mkdir(parents=True)
    assert Places(tmp_path).cgroup("0123456789abcdef0123456789abcdef") == made
