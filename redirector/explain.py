"""`redirector explain`: what the rules say of a connection, without sending anything."""

import argparse
import contextlib
import socket
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address

from redirector import network
from redirector.errors import InputError
from redirector.model import IPAddress, Mode, Pod, without_links
from redirector.steering import Connection, Direction, Protocol, Verdict, decide, unmapped

# The one above means "no id" to the kernel (user_namespaces(7)).
_HIGHEST_ID = 2**32 - 2
_ALL_OF_THE_LINK = IPv4Address("255.255.255.255")
#: STEERED_LOOPBACK, bpf/sockops/common.h.
STEERED_LOOPBACK = IPv4Network("127.1.0.0/16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `redirector explain`."""
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--to", required=True, metavar="IP:PORT", help="IPv6 as [IP]:PORT")
    parser.add_argument("--udp", action="store_true", help="by UDP; TCP if not given")
    parser.add_argument(
        "--from", metavar="IP", dest="source", help="the address that the socket is bound to"
    )
    parser.add_argument(
        "--interface",
        default="",
        metavar="NAME",
        help="by which it leaves or comes in (default: by which the pod's routes lead there)",
    )
    parser.add_argument("--uid", type=int, default=0, help="of who connects (default: %(default)s)")
    parser.add_argument("--gid", type=int, default=0, help="of who connects (default: %(default)s)")
    parser.add_argument(
        "--inbound", action="store_true", help="somebody outside the pod connects to it"
    )


def explain(arguments: argparse.Namespace, pod: Pod) -> str:
    """One line: where the connection goes, and by which rule. InputError on a wrong address."""
    destination, port = _endpoint(arguments.to)
    source = _address("--from", arguments.source) if arguments.source else None
    if source and unmapped(source).version != unmapped(destination).version:
        raise InputError(f"--from {source}: cannot reach {destination}; give one of its family")
    for option, number in (("--uid", arguments.uid), ("--gid", arguments.gid)):
        if not 0 <= number <= _HIGHEST_ID:
            raise InputError(f"{option} {number}: is no id; give a number from 0 to {_HIGHEST_ID}")
    connection = Connection(
        direction=Direction.INBOUND if arguments.inbound else Direction.OUTBOUND,
        destination=destination,
        port=port,
        own=_own(pod),
        source=source,
        uid=arguments.uid,
        gid=arguments.gid,
        protocol=Protocol.UDP if arguments.udp else Protocol.TCP,
        interface=arguments.interface,
    )
    if pod.steering.exclude_interfaces and not connection.interface:
        connection = replace(connection, interface=_interface(pod, connection))
    if _passes_through(pod, connection):
        return f"{arguments.to}: direct: it only passes through the pod ({pod.mode} mode)"
    decision = decide(pod.steering, connection)
    nowhere = _unreachable(pod, connection, decision.verdict)
    if nowhere:
        return f"{arguments.to}: unreachable: {nowhere} ({pod.mode} mode)"
    if decision.verdict is Verdict.DIRECT and _refused(pod, connection):
        return (
            f"{arguments.to}: refused: the sidecar's own port takes what was steered to it, and "
            f"rule {decision.rule} steers this nowhere ({pod.mode} mode)"
        )
    ports = {
        Verdict.OUTBOUND: f"steered to the sidecar's outbound port {pod.steering.outbound_port}",
        Verdict.INBOUND: f"steered to the sidecar's inbound port {pod.steering.inbound_port}",
        Verdict.DNS: f"steered to the sidecar's DNS port {pod.steering.dns_port}",
        Verdict.DIRECT: "direct",
    }
    return f"{arguments.to}: {ports[decision.verdict]}, by rule {decision.rule} ({pod.mode} mode)"


def require_there(pod: Pod, interface: str = "") -> None:
    """Raise InputError when the pod's namespace is gone, or has no interface of that name.

    What its options name is no mistake: it may come later.
    """
    try:
        there = network.is_pods(pod)
    except InputError:
        there = False
    if not there:
        raise InputError(
            f"pod {pod.name}: its network namespace {pod.netns} is gone, nothing of it is steered; "
            f"take it off: redirector unenroll {pod.name}"
        )
    known = {name for _, name in network.within(pod.netns, socket.if_nameindex)}
    known |= pod.steering.exclude_interfaces | pod.steering.kubevirt_interfaces
    if interface and interface not in known:
        listed = ", ".join(sorted(known))
        raise InputError(f"--interface {interface}: pod {pod.name} has none; it has {listed}")


def _own(pod: Pod) -> tuple[IPAddress, ...]:
    """Those that it has now: some may have come after its enrolment."""
    with contextlib.suppress(InputError):
        if network.is_pods(pod):
            return network.addresses(pod.netns)
    return pod.addresses


def _passes_through(pod: Pod, connection: Connection) -> bool:
    """What the pod merely forwards reaches no socket of it: only iptables rules see it."""
    inbound = connection.direction is Direction.INBOUND and pod.mode is Mode.EBPF
    return inbound and not connection.local and not connection.destination.is_link_local


def _refused(pod: Pod, connection: Connection) -> bool:
    """Dialled by hand, the sidecar's ports refuse in eBPF mode: `no-flow` (inbound.c)."""
    return (
        pod.mode is Mode.EBPF
        and connection.protocol is Protocol.TCP
        and connection.direction is Direction.OUTBOUND
        and (connection.destination in connection.own or connection.destination in STEERED_LOOPBACK)
        and connection.port in (pod.steering.outbound_port, pod.steering.inbound_port)
    )


def _unreachable(pod: Pod, connection: Connection, verdict: Verdict) -> str:
    """Why connect() answers ENETUNREACH, whatever the rules say; empty when it does not."""
    if connection.protocol is not Protocol.TCP or connection.direction is Direction.INBOUND:
        return ""
    to = connection.destination
    if to.is_multicast or to == _ALL_OF_THE_LINK:
        return "no TCP connection leads to many"
    # Where the programs would aim at (take_aim, connect.c): one of a link cannot be told to them.
    aimed = any(ip.version == to.version for ip in without_links(pod.addresses))
    if pod.mode is Mode.EBPF and verdict is Verdict.OUTBOUND and not connection.local and not aimed:
        return f"the pod has no IPv{to.version} address"
    return ""


def _interface(pod: Pod, connection: Connection) -> str:
    if connection.direction is Direction.INBOUND:
        raise InputError(
            f"pod {pod.name} has excludeInterfaces: say by which interface it comes in: --interface"
        )
    return network.leaves_by(pod.netns, connection.destination)


def _endpoint(text: str) -> tuple[IPAddress, int]:
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InputError(f"--to {text}: write an IPv6 address in brackets: [{host}]:{port}")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise InputError(f"--to {text}: {port!r} is not a port; give IP:PORT with a port 1-65535")
    return _address("--to", host), int(port)


def _address(option: str, text: str) -> IPAddress:
    try:
        address = ip_address(text)
        # The interface behind a link-local one ("%eth0") is no part of the address.
        return IPv6Address(int(address)) if isinstance(address, IPv6Address) else address
    except ValueError:
        raise InputError(
            f"{option} {text}: is not an IP address; names are not looked up"
        ) from None
