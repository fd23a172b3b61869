"""`explain` says what `decide` decides, in one line."""

import argparse
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from redirector.errors import InputError
from redirector.explain import add_arguments, explain, require_there
from redirector.model import Mode, Pod, Steering

POD = Pod(
    "demo/web",
    Path("/run/netns/x"),
    Path("/cgroup/x"),
    Mode.EBPF,
    steering=Steering(
        exclude_outbound_ports=frozenset({3306}),
        exclude_owner_groups=frozenset({7}),
        exclude_interfaces=frozenset({"eth1"}),
        dns_capture=True,
        dns_servers=(ip_address("10.96.0.10"),),
    ),
    addresses=(ip_address("10.0.0.5"), ip_address("fd00::5"), ip_address("fe80::5")),
)


def ask(*words: str, pod: Pod = POD) -> str:
    words = (*words, "--interface", "eth0") if "--interface" not in words else words
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return explain(parser.parse_args(["demo/web", *words]), pod)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--to", "10.96.0.1:80"], "outbound port 15001, by rule outbound.included-cidr"),
        (["--to", "[fd96::1]:80"], "outbound port 15001, by rule outbound.included-cidr"),
        (["--to", "10.96.0.1:3306"], "direct, by rule outbound.excluded-port"),
        (["--to", "10.96.0.1:80", "--uid", "1337"], "direct, by rule outbound.proxy-uid"),
        (["--to", "10.0.0.5:80", "--uid", "1337"], "inbound port 15006, by rule outbound.proxy-"),
        (
            ["--to", "10.0.0.5:80", "--uid", "1337", "--from", "127.0.0.6"],
            "direct, by rule outbound.passthrough",
        ),
        (["--to", "10.96.0.10:53", "--udp"], "DNS port 15053, by rule outbound.dns"),
        (["--to", "10.96.0.10:53"], "DNS port 15053, by rule outbound.dns"),
        (["--to", "10.96.0.11:53", "--udp"], "direct, by rule outbound.not-tcp"),
        (["--to", "10.96.0.1:80", "--gid", "7"], "direct, by rule outbound.excluded-group"),
        (
            ["--to", "10.96.0.1:80", "--interface", "eth1"],
            "direct, by rule outbound.excluded-interface",
        ),
        (
            ["--to", "10.0.0.5:80", "--inbound", "--interface", "eth1"],
            "direct, by rule inbound.excluded-interface",
        ),
        (["--to", "10.0.0.5:8080", "--inbound"], "inbound port 15006, by rule inbound.included-"),
        (["--to", "10.0.0.5:15020", "--inbound"], "direct, by rule inbound.excluded-port"),
        (["--to", "10.0.0.5:15001"], "refused: the sidecar's own port"),
        (["--to", "10.0.0.5:15006"], "refused: the sidecar's own port"),
        (["--to", "127.1.2.3:15001"], "refused: the sidecar's own port"),
        (["--to", "127.0.0.1:15001"], "direct, by rule outbound.app-local"),
        (["--to", "224.0.0.5:80"], "unreachable: no TCP connection leads to many"),
        (["--to", "[::ffff:255.255.255.255]:80"], "unreachable: no TCP connection leads to many"),
        (["--to", "[ff05::2]:80"], "unreachable: no TCP connection leads to many"),
        (["--to", "224.0.0.5:80", "--udp"], "direct, by rule outbound.not-tcp"),
        (["--to", "[fe80::5%eth0]:80"], "direct, by rule outbound.app-local"),
        (["--to", "[fe80::6%eth0]:80"], "outbound port 15001, by rule outbound.included-cidr"),
        (["--to", "10.0.0.5:15001", "--inbound"], "inbound port 15006, by rule inbound.included-"),
    ],
)
def test_it_names_the_way_and_the_rule(words: list[str], answer: str) -> None:
    said = ask(*words)
    assert said.startswith(words[1])
    assert answer in said
    assert "ebpf mode" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--to", "10.96.0.1"], "not a port"),
        (["--to", "10.96.0.1:70000"], "'70000' is not a port"),
        (["--to", "fd96::1:80"], "in brackets"),
        (["--to", "example.com:80"], "names are not looked up"),
        (["--to", "10.96.0.1:80", "--from", "x"], "--from x: is not an IP address"),
        (["--to", "10.96.0.1:80", "--from", "fd00::5"], "--from fd00::5: cannot reach 10.96.0.1"),
        (["--to", "10.96.0.1:80", "--uid", "-5"], "--uid -5: is no id"),
        (["--to", "10.96.0.1:80", "--gid", "4294967295"], "--gid 4294967295: is no id"),
    ],
)
def test_wrong_addresses_are_named(words: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ask(*words)


def test_dialled_by_hand_the_sidecars_ports_answer_in_iptables_mode() -> None:
    pod = replace(POD, mode=Mode.IPTABLES)
    assert "direct, by rule outbound.app-local" in ask("--to", "10.0.0.5:15001", pod=pod)


@pytest.mark.parametrize(
    ("addresses", "unreachable", "reachable"),
    [
        (["10.0.0.5", "fe80::5"], "[fd96::1]:80", "10.96.0.1:80"),
        (["fd00::5"], "10.96.0.1:80", "[fd96::1]:80"),
        (["fe80::5"], "[fe80::6]:80", "[fe80::5]:80"),
    ],
)
def test_a_family_that_the_pod_has_no_address_of(
    addresses: list[str], unreachable: str, reachable: str
) -> None:
    pod = replace(POD, addresses=tuple(map(ip_address, addresses)))
    assert "unreachable: the pod has no IPv" in ask("--to", unreachable, pod=pod)
    assert "unreachable" not in ask("--to", reachable, pod=pod)
    # Of the sidecar's own nothing is aimed anywhere.
    assert "by rule outbound.proxy-uid" in ask("--to", unreachable, "--uid", "1337", pod=pod)


def test_a_pod_that_is_gone_is_told_so() -> None:
    with pytest.raises(InputError, match=r"/run/netns/x is gone.*redirector unenroll demo/web"):
        require_there(POD)


def test_what_passes_through_the_pod_is_captured_by_iptables_rules_only() -> None:
    words = ("--to", "10.9.9.9:80", "--inbound")
    assert "direct: it only passes through" in ask(*words)
    assert "inbound port 15006" in ask(*words, pod=replace(POD, mode=Mode.IPTABLES))
