"""Looking into a network namespace, on the real kernel."""

import os
import socket
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from redirector.errors import InputError
from redirector.lab import Node
from redirector.network import (
    addresses,
    netns_cookie,
    open_connections,
    own_netns_cookie,
    require_netns,
    run_in,
    within,
)

pytestmark = pytest.mark.root


def own() -> str:
    return os.readlink("/proc/thread-self/ns/net")


def test_addresses_leave_out_loopback_and_begin_with_the_pods_own(node: Node) -> None:
    pod = node.pod("a")
    for address, device in (
        ("169.254.7.7/16", "eth0"),
        ("198.51.100.7/32", "lo"),
        ("192.0.2.7/32", "eth0"),
        ("fe80::7/64", "eth0"),
    ):
        pod.run(["ip", "address", "add", address, "dev", device], check=True)
    found = [str(address) for address in addresses(pod.netns)]
    assert found[:5] == [pod.ip, "192.0.2.7", "198.51.100.7", pod.ip6, "169.254.7.7"]
    # And that which the kernel makes of eth0's hardware address, once the link is up.
    assert "fe80::7" in found[5:]


def test_cookies_tell_namespaces_apart(node: Node) -> None:
    first, second = node.pod("a").netns, node.pod("b").netns
    assert netns_cookie(first) == netns_cookie(first) == within(first, own_netns_cookie)
    assert len({netns_cookie(first), netns_cookie(second), own_netns_cookie()}) == 3


def test_programs_run_there_and_we_stay_here(node: Node) -> None:
    pod, here = node.pod("a"), own()
    done = run_in(pod.netns, ["sh", "-c", "readlink /proc/self/ns/net; cat"], "to stdin")
    there, text = done.stdout.split("\n")
    assert f"net:[{pod.netns.stat().st_ino}]" == there != here
    assert text == "to stdin"
    with pytest.raises(FileNotFoundError):
        run_in(pod.netns, ["/nonesuch"])
    assert own() == here


def test_open_connections(node: Node) -> None:
    pod = node.pod("a")

    def listen() -> socket.socket:
        return socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)

    def connect() -> list[socket.socket]:
        return [socket.create_connection((ip, 8080)) for ip in ("127.0.0.1", pod.ip6)]

    with within(pod.netns, listen):
        assert open_connections(pod.netns, {8080}) == frozenset()
        clients = within(pod.netns, connect)
        # IPv4 through a socket of IPv6 counts as IPv4.
        expected = {(IPv4Address("127.0.0.1"), 8080), (ip_address(pod.ip6), 8080)}
        assert open_connections(pod.netns, {80, 8080}) == expected
        assert open_connections(pod.netns, {80}) == frozenset()
        for client in clients:
            client.close()


@pytest.mark.parametrize("path", ["/nonesuch", "/proc/self/ns/mnt", "/etc/passwd", "/tmp"])
def test_what_is_no_network_namespace(path: str) -> None:
    with pytest.raises(InputError, match=rf"netns {path}: .*; give a path such as /run/netns/NAME"):
        require_netns(Path(path))
