"""Whose configuration a certificate opens."""

from ipaddress import ip_address

import pytest
from xds_server.identity import NotPermitted, Peer, permit
from xds_server.ir import Name, NodeId, Workload

ACCOUNT = "spiffe://mesh.example/ns/demo/sa/web"
NODE = NodeId("10.0.0.1", "web-1", "demo")
NAME = Name("demo", "web-1")
PODS = {NAME: Workload(NAME, (ip_address("10.0.0.1"),), service_account="web")}


@pytest.mark.parametrize(
    "peer",
    [
        Peer(uris=(ACCOUNT,)),
        Peer(uris=("spiffe://mesh.example/ns/demo/sa/other", ACCOUNT)),
        Peer(dns_names=("web-1.demo",)),
    ],
)
def test_account_or_pod_opens_its_own(peer: Peer) -> None:
    permit(PODS, "mesh.example", NODE, peer)


@pytest.mark.parametrize(
    "peer",
    [
        Peer(),
        Peer(uris=("spiffe://mesh.example/ns/demo/sa/webber",)),
        Peer(uris=("spiffe://mesh.example/ns/other/sa/web",)),
        Peer(uris=("spiffe://elsewhere/ns/demo/sa/web",)),
        Peer(uris=("web-1.demo",)),
        Peer(dns_names=(ACCOUNT, "web-1", "web-2.demo", "web-1.demo.example", "*.demo")),
    ],
)
def test_others_names_do_not(peer: Peer) -> None:
    with pytest.raises(NotPermitted) as refused:
        permit(PODS, "mesh.example", NODE, peer)
    text = str(refused.value)
    assert text.startswith("pod demo/web-1: the certificate is that of ")
    assert text.endswith(f"; it must name {ACCOUNT} or DNS web-1.demo")


def test_node_id_must_be_that_of_a_pod_with_its_address() -> None:
    peer = Peer(uris=(ACCOUNT,))
    with pytest.raises(NotPermitted, match=r"pod demo/web-2: not in the mesh"):
        permit(PODS, "mesh.example", NodeId("10.0.0.1", "web-2", "demo"), peer)
    with pytest.raises(NotPermitted, match=r"its address is 10\.0\.0\.1, not 10\.0\.0\.2"):
        permit(PODS, "mesh.example", NodeId("10.0.0.2", "web-1", "demo"), peer)


def test_pod_that_has_no_address_yet_may_say_which() -> None:
    starting = {NAME: Workload(NAME, service_account="web")}
    permit(starting, "mesh.example", NODE, Peer(uris=(ACCOUNT,)))


def test_plaintext_proves_nothing_and_names_keep_their_kind() -> None:
    assert Peer.of({"transport_security_type": [b"insecure"]}) is None
    properties = {
        "x509_pem_cert": [b"..."],
        "peer_uri": [b"spiffe://a/ns/b/sa/c"],
        "peer_dns": [b"d.e"],
        "peer_ip": [b"1.2.3.4"],
        "peer_email": [b"f@g"],
    }
    assert Peer.of(properties) == Peer(("spiffe://a/ns/b/sa/c",), ("d.e",))
