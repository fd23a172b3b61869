"""`redirector await`: hold a pod's start until its connections are steered.

Runs inside the pod, before the sidecar. It listens where the sidecar will, and connects to an
address that nobody has (RFC 5737, RFC 3849): only steering can bring that connection here. Until
then its SYN lives for one hop (TTL 1), so that nothing gets past the node.
"""

import argparse
import errno
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TextIO

from redirector.errors import InputError, MachineError
from redirector.model import IPAddress, Steering

#: TEST-NET-1 and its like.
DOCUMENTATION: tuple[IPAddress, IPAddress] = (
    IPv4Address("192.0.2.1"),
    IPv6Address("2001:db8::1"),
)
_PORT = 80
_SO_ORIGINAL_DST = 80  # of SOL_IP and, as IP6T_SO_ORIGINAL_DST, of SOL_IPV6
_SOL_IPV6 = 41
_TRY_SECONDS, _PAUSE_SECONDS = 0.25, 0.1
#: What a connection that is not steered may run into; anything else is a mistake to be told.
_NOT_YET = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EACCES,
    errno.EPERM,
    errno.ETIMEDOUT,
    errno.EADDRNOTAVAIL,
}


@dataclass(frozen=True)
class Target:
    """Where to connect."""

    address: IPAddress
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        """AF_INET or AF_INET6."""
        return socket.AF_INET6 if self.address.version == 6 else socket.AF_INET


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `redirector await`."""
    parser.add_argument(
        "--to",
        metavar="IP:PORT",
        help="an address that the pod's rules steer; it is never reached (default: "
        f"{DOCUMENTATION[0]}:{_PORT}, or [{DOCUMENTATION[1]}]:{_PORT} without IPv4)",
    )
    parser.add_argument(
        "--outbound-port",
        metavar="PORT",
        type=int,
        default=Steering().outbound_port,
        help="the sidecar's outbound listener (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="fail after this time, for the kubelet to try again (default: %(default)g)",
    )


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    """Return when the pod is steered; MachineError when it is not in time."""
    if not 1 <= arguments.outbound_port <= 65535:
        raise InputError(f"--outbound-port {arguments.outbound_port}: is not a port")
    target = _target(arguments.to) if arguments.to else _default()
    began = time.monotonic()
    await_steering(target, arguments.outbound_port, arguments.timeout)
    out.write(f"steered after {time.monotonic() - began:.1f} s\n")
    return 0


def await_steering(
    target: Target,
    outbound_port: int,
    timeout: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Connect to the target again and again, until a connection arrives at our own listener."""
    deadline = clock() + timeout
    with _listener(target.family, outbound_port) as listener:
        while not _arrives(target, listener):
            if clock() >= deadline:
                raise MachineError(
                    f"connections of this pod are not steered after {timeout:g} s (tried "
                    f"{target.address} port {target.port}, as this user); see the agent's log "
                    "and 'redirector status' on the node; name an address that the pod's own "
                    "rules include with --to"
                )
            time.sleep(_PAUSE_SECONDS)


def _listener(family: socket.AddressFamily, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
        listener.listen()
        listener.settimeout(_TRY_SECONDS)
    except OSError as error:
        listener.close()
        raise MachineError(
            f"port {port}: {error.strerror}; run this before the sidecar, in an init container"
        ) from None
    return listener


def _arrives(target: Target, listener: socket.socket) -> bool:
    with socket.socket(target.family, socket.SOCK_STREAM) as client:
        client.settimeout(_TRY_SECONDS)
        if target.family == socket.AF_INET:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
        else:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
        try:
            client.connect((str(target.address), target.port))
        except TimeoutError:
            return False
        except OSError as error:
            if error.errno in _NOT_YET:
                return False
            raise MachineError(f"{target.address}: {error.strerror}") from None
        # Somebody answered; was it us?
        return _accepted(listener, client.getsockname()[:2], target)


def _accepted(listener: socket.socket, client: tuple[str, int], target: Target) -> bool:
    try:
        while True:
            connection, peer = listener.accept()
            with connection:
                if peer[:2] == client:
                    return _original_destination(connection) == target
    except TimeoutError:
        return False


def _original_destination(connection: socket.socket) -> Target | None:
    """What the sidecar will be told of a connection (SO_ORIGINAL_DST)."""
    v6 = connection.family == socket.AF_INET6
    try:
        raw = connection.getsockopt(_SOL_IPV6 if v6 else socket.SOL_IP, _SO_ORIGINAL_DST, 28)
    except OSError:
        return None
    (port,) = struct.unpack_from("!H", raw, 2)
    return Target(ip_address(raw[8:24] if v6 else raw[4:8]), port)


def _default() -> Target:
    """IPv4, unless the pod has none beside loopback."""
    v4, v6 = DOCUMENTATION
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing: it looks for a route.
            probe.connect((str(v4), _PORT))
        except OSError:
            return Target(v6, _PORT)
    return Target(v4, _PORT)


def _target(text: str) -> Target:
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        address = None
    if address is None or bracketed != (address.version == 6) or not port.isdecimal():
        raise InputError(f"--to {text}: is not IP:PORT or [V6]:PORT")
    if not 1 <= int(port) <= 65535:
        raise InputError(f"--to {text}: {port} is not a port")
    return Target(address, int(port))
