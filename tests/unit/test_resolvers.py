"""Which resolvers a pod asks, from its resolv.conf."""

import os
from dataclasses import replace
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from redirector.errors import InputError
from redirector.model import Steering
from redirector.resolvers import nameservers, with_resolvers

CAPTURE = Steering(dns_capture=True)


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        (
            "search a b\nnameserver 10.96.0.10\nnameserver fd96::a # old\n",
            ("10.96.0.10", "fd96::a"),
        ),
        ("nameserver 10.96.0.10\n\tnameserver 10.96.0.10\n", ("10.96.0.10",)),
        ("nameserver ::ffff:10.96.0.10\n", ("10.96.0.10",)),
        ("nameserver fe80::1%eth0\n", ("fe80::1",)),
        ("nameserver 0.0.0.0\nnameserver ::\n", ("127.0.0.1", "::1")),
        ("#nameserver 10.0.0.1\nnameserver\nnameserver dns.local\n", ("127.0.0.1",)),
        ("", ("127.0.0.1",)),
    ],
)
def test_nameservers(text: str, addresses: tuple[str, ...]) -> None:
    assert nameservers(text) == tuple(map(ip_address, addresses))


def cgroup(directory: Path, *pids: int) -> Path:
    (directory / "app").mkdir(parents=True)
    (directory / "cgroup.procs").write_text("")
    (directory / "app/cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    return directory


def test_the_pods_processes_know(tmp_path: Path) -> None:
    gone = 2**22
    found = with_resolvers(
        "pod", CAPTURE, Path("/run/netns/x"), cgroup(tmp_path / "c", gone, os.getpid())
    )
    assert found == replace(CAPTURE, dns_servers=nameservers(Path("/etc/resolv.conf").read_text()))


def test_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pod p: dnsCapture: .* name them with dnsServers"):
        with_resolvers("p", CAPTURE, Path("/run/netns/none"), cgroup(tmp_path / "c"))


def test_what_is_named_stays(tmp_path: Path) -> None:
    for named in (
        replace(CAPTURE, dns_servers=(IPv4Address("10.0.0.1"),)),
        replace(CAPTURE, dns_servers=None),
        Steering(),
    ):
        assert with_resolvers("p", named, tmp_path, tmp_path) == named
