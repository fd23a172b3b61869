"""Connections that programs seldom make: none gets past the sidecar, none leaves a trace."""

import ctypes
import ipaddress
import socket
import struct

import pytest
from sockets import pod_socket

from redirector.datapath.layout import Counter
from redirector.datapath.pins import Datapath
from redirector.lab import LabPod, Node
from redirector.network import netns_cookie, within

pytestmark = pytest.mark.root

SERVICE = ("10.96.1.1", 80)
SERVICE6 = ("fd96::1", 80)
OUTBOUND, INBOUND, APP = 15001, 15006, 8080
SO_ORIGINAL_DST = 80
ADDED = "10.77.0.99"
#: A low address that is not loopback's.
LOW6 = "::1234"


def listen(pod: LabPod, port: int, *, v6: bool = False, sidecar: bool = False) -> socket.socket:
    family = socket.AF_INET6 if v6 else socket.AF_INET
    listener = pod_socket(pod, sidecar=sidecar, family=family)
    listener.bind(("::" if v6 else "0.0.0.0", port))
    listener.listen()
    return listener


def link_local(pod: LabPod) -> tuple[str, int]:
    """The address and scope of the pod's eth0."""
    lines = pod.run(["ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"]).stdout
    scope = within(pod.netns, lambda: socket.if_nametoindex("eth0"))
    return lines.split()[3].partition("/")[0], scope


def use_link_local(pod: LabPod) -> tuple[str, int]:
    """The same, once no duplicate address detection (RFC 4862) holds it up."""
    address, scope = link_local(pod)
    for verb in (["del"], ["add", "nodad"]):
        argv = ["ip", "addr", verb[0], f"{address}/64", "dev", "eth0", "scope", "link", *verb[1:]]
        pod.run(argv, check=True)
    return address, scope


def disconnect(connected: socket.socket) -> None:
    """Python has no name for it: connect(2) with AF_UNSPEC."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(connected.fileno(), bytes(16), 16) == 0, ctypes.get_errno()


def flows(pod: LabPod, datapath: Datapath) -> int:
    return sum(f.flow.client_netns == netns_cookie(pod.netns) for f in datapath.maps.flows())


@pytest.mark.parametrize("port", [APP, INBOUND])
def test_a_refused_connect_leaves_nothing_for_the_next(
    pod: LabPod, datapath: Datapath, port: int
) -> None:
    """The socket of a steered connect() that failed then goes where nothing is steered."""
    with listen(pod, port) as listener, pod_socket(pod) as client:
        client.settimeout(None)  # Python's own timeout would leave the socket connecting
        with pytest.raises(ConnectionRefusedError):
            client.connect(SERVICE)
        if port == INBOUND:
            with pytest.raises(ConnectionRefusedError):
                client.connect((pod.ip, port))
            return
        client.connect((pod.ip, port))
        server, _ = listener.accept()
        with server:
            assert client.getpeername() == (pod.ip, port)
            with pytest.raises(FileNotFoundError):
                server.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
            assert flows(pod, datapath) == 0


@pytest.mark.parametrize("port", [OUTBOUND, INBOUND])
def test_the_passthrough_source_opens_no_sidecar_port(pod: LabPod, port: int) -> None:
    """Its connections have a flow, to be short-circuited, but no original destination."""
    with listen(pod, port, sidecar=True), pod_socket(pod) as client:
        client.bind(("127.0.0.6", 0))
        with pytest.raises(ConnectionRefusedError):
            client.connect((pod.ip, port))


@pytest.mark.parametrize("steered", [True, False])
def test_a_socket_that_connects_again_has_nothing_of_before(
    pod: LabPod, datapath: Datapath, steered: bool
) -> None:
    """Disconnected (AF_UNSPEC) with redirected bytes unread, as TCP forgets its own."""
    with (
        listen(pod, OUTBOUND, sidecar=True) as sidecar,
        listen(pod, APP) as app,
        pod_socket(pod) as client,
    ):
        client.connect(SERVICE)
        first, _ = sidecar.accept()
        with first:
            first.settimeout(10)
            client.sendall(b"hello")
            assert first.recv(5) == b"hello"
            first.sendall(b"unread")
            disconnect(client)
        client.connect(SERVICE if steered else (pod.ip, APP))
        second, _ = (sidecar if steered else app).accept()
        with second:
            second.settimeout(10)
            for text in (b"one", b"two"):
                second.sendall(text)
                assert client.recv(16) == text
                client.sendall(text)
                assert second.recv(16) == text
            client.close()
    assert flows(pod, datapath) == 0


def test_a_socket_that_connects_to_itself_leaves_no_flow(pod: LabPod, datapath: Datapath) -> None:
    for port in range(30_000, 30_010):
        with pod_socket(pod) as client:
            client.bind(("127.0.0.6", port))
            client.connect(("127.0.0.6", port))
            client.sendall(b"echo")
            assert client.recv(4) == b"echo"
    assert flows(pod, datapath) == 0


def test_a_link_local_address_leads_to_the_sidecar(
    node: Node, pod: LabPod, datapath: Datapath
) -> None:
    """Whether enrolment found it or not: the hook knows the pod by its namespace."""
    peer = node.pod("peer")
    (address, _), (_, scope) = use_link_local(pod), use_link_local(peer)
    with listen(pod, APP, v6=True):
        with (
            pod_socket(peer, family=socket.AF_INET6) as client,
            pytest.raises(ConnectionRefusedError),
        ):
            client.connect((address, APP, 0, scope))
        counters = datapath.maps.counters(netns_cookie(pod.netns))
        assert counters[Counter.REFUSED_NO_LISTENER] == 1
        with (
            listen(pod, INBOUND, v6=True, sidecar=True) as sidecar,
            pod_socket(peer, family=socket.AF_INET6) as client,
        ):
            client.connect((address, APP, 0, scope))
            server, _ = sidecar.accept()
            with server:
                assert server.getsockname()[:2] == (address, APP)


def test_an_address_newer_than_the_enrolment_leads_to_the_sidecar(node: Node, pod: LabPod) -> None:
    peer = node.pod("peer")
    pod.run(["ip", "addr", "add", f"{ADDED}/24", "dev", "eth0"], check=True)
    with listen(pod, APP), listen(pod, INBOUND, sidecar=True) as sidecar:
        with pod_socket(peer) as client:
            client.connect((ADDED, APP))
            server, _ = sidecar.accept()
            with server:
                assert server.getsockname() == (ADDED, APP)
        # From itself to itself.
        with pod_socket(pod, uid=1337) as client:
            client.connect((ADDED, APP))


def test_a_low_ipv6_source_leads_not_past_the_sidecar(node: Node, pod: LabPod) -> None:
    peer = node.pod("peer")
    peer.run(["ip", "addr", "add", f"{LOW6}/128", "dev", "eth0", "nodad"], check=True)
    pod.run(["ip", "route", "add", LOW6, "via", peer.ip6], check=True)
    with (
        listen(pod, APP, v6=True),
        listen(pod, INBOUND, v6=True, sidecar=True) as sidecar,
        pod_socket(peer, family=socket.AF_INET6) as client,
    ):
        client.bind((LOW6, 0))
        client.connect((pod.ip6, APP))
        server, source = sidecar.accept()
        with server:
            assert source[0] == LOW6


@pytest.mark.parametrize("address", ["::6", "127.0.0.9"])
def test_a_loopback_address_leads_nobody_from_outside_past_the_sidecar(
    node: Node, pod: LabPod, address: str
) -> None:
    """The ::6 that enrolment gives the pod, and 127/8 where it is routed: any neighbour can ask."""
    peer = node.pod("peer")
    v6 = ":" in address
    for each in (pod, peer):
        each.run(["sysctl", "-q", "net.ipv4.conf.all.route_localnet=1"], check=True)
    if not v6:
        peer.run(["ip", "route", "del", "local", "127.0.0.0/8", "table", "local"], check=True)
    way = [address, "via", pod.ip6] if v6 else [address, "via", pod.ip, "src", peer.ip]
    peer.run(["ip", "route", "add", *way], check=True)
    with (
        listen(pod, APP, v6=v6),
        listen(pod, INBOUND, v6=v6, sidecar=True) as sidecar,
        pod_socket(peer, family=socket.AF_INET6 if v6 else socket.AF_INET) as client,
    ):
        client.connect((address, APP))
        sidecar.settimeout(10)
        server, _ = sidecar.accept()
        with server:
            assert server.getsockname()[:2] == (address, APP)


def test_ports_suffice_for_connections_to_many_places(pod: LabPod) -> None:
    """Also while many are in TIME_WAIT: each destination has all of the pod's ports, as always."""
    pod.run(["sysctl", "-q", "net.ipv4.ip_local_port_range=40000 40031"], check=True)
    places = [(f"10.96.2.{host}", 80) for host in range(1, 5)]
    with listen(pod, OUTBOUND, sidecar=True) as sidecar:
        for place in places * 9:
            with pod_socket(pod) as client:
                client.connect(place)
                assert client.getsockname()[0] == pod.ip
            server, source = sidecar.accept()
            with server:
                raw = server.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
                assert (socket.inet_ntoa(raw[4:8]), source[0]) == (place[0], pod.ip)
                assert server.recv(1) == b""


def test_any_source_address_leads_to_the_outbound_listener(pod: LabPod) -> None:
    """A source that enrolment did not know must not pass for somebody outside."""
    pod.run(["ip", "addr", "add", f"{ADDED}/24", "dev", "eth0"], check=True)
    address, scope = use_link_local(pod)
    with (
        listen(pod, OUTBOUND, v6=True, sidecar=True) as outbound,
        listen(pod, INBOUND, v6=True, sidecar=True),
        pod_socket(pod) as client,
        pod_socket(pod, family=socket.AF_INET6) as client6,
    ):
        client.bind((ADDED, 0))
        client.connect(SERVICE)
        server, _ = outbound.accept()
        with server:
            raw = server.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        assert (socket.inet_ntoa(raw[4:8]), *struct.unpack_from("!H", raw, 2)) == SERVICE
        client6.bind((address, 0, 0, scope))
        client6.connect(SERVICE6)
        server, _ = outbound.accept()
        with server:
            raw = server.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        assert str(ipaddress.IPv6Address(raw[8:24])) == SERVICE6[0]
