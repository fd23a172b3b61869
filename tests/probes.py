"""Listeners that say where a connection arrived, and callers that ask them.

A listener's first line names itself and the connection's original destination; then it echoes.
Over UDP it answers each datagram with itself and the sender, from the address that was asked.
Everything runs in forked children, because uid 1337 may not read a clone's files.
"""

import errno
import json
import multiprocessing
import os
import selectors
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from multiprocessing.process import BaseProcess
from typing import Any

from redirector.lab import LabPod
from redirector.lab.enter import Place
from redirector.model import IPAddress
from redirector.steering import Protocol, Verdict, unmapped

SO_ORIGINAL_DST = 80  # of SOL_IP and, as IP6T_SO_ORIGINAL_DST, of SOL_IPV6
SOL_IPV6 = 41
# Python has no names for these: ip(7), linux/in6.h.
IP_PKTINFO = 8
IPV6_FREEBIND = 78
TIMEOUT = 10.0

Listener = tuple[Verdict, int]


@dataclass(frozen=True)
class Call:
    """A connection to make."""

    destination: IPAddress
    port: int
    source: IPAddress | None = None
    protocol: Protocol = Protocol.TCP


@dataclass(frozen=True)
class Arrival:
    """Who accepted a connection, what it held for the original destination, and from whom.

    Of UDP the original destination is where the answer seems to come from.
    """

    verdict: Verdict
    destination: IPAddress
    port: int
    client: IPAddress


def start(
    pod: LabPod, listeners: Sequence[Listener], *, sidecar: bool = False, share: bool = False
) -> BaseProcess:
    """Listen on all addresses of both families in the pod until its node closes.

    Answers the process, for who wants it to end sooner. With `share`, others may listen on the same
    ports (SO_REUSEPORT).
    """
    return _start(pod.place(sidecar=sidecar), listeners, share)


def dial(calls: Iterable[Call]) -> list[Arrival | str]:
    """Make the connections one by one; an errno's name stands for one that failed."""
    return [_dial(call) for call in calls]


def connect(call: Call) -> tuple[socket.socket, Arrival]:
    """Connect from the calling thread's namespace; the socket stays open, ready to echo."""
    v6 = isinstance(call.destination, IPv6Address)
    connection = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.settimeout(TIMEOUT)
        if call.source is not None:
            connection.bind((str(call.source), 0))
        connection.connect((str(call.destination), call.port))
        return connection, read_arrival(connection)
    except BaseException:
        connection.close()
        raise


def echo(connection: socket.socket, text: bytes) -> bytes:
    """Send and read back as many bytes; fewer when the connection ended."""
    connection.sendall(text)
    got = b""
    while len(got) < len(text):
        chunk = connection.recv(len(text) - len(got))
        if not chunk:
            break
        got += chunk
    return got


def ask(socket_: socket.socket, destination: IPAddress, port: int) -> Arrival:
    """Send a datagram and wait for its answer."""
    socket_.settimeout(TIMEOUT)
    return answer_of(socket_, lambda: socket_.sendto(b"?", (str(destination), port)))


def answer_of(socket_: socket.socket, send: Callable[[], object]) -> Arrival:
    """Send somehow and wait for the answer."""
    send()
    answer, (address, answered_port, *_) = socket_.recvfrom(4096)
    verdict, client = json.loads(answer)
    source = unmapped(ip_address(address))
    return Arrival(Verdict(verdict), source, answered_port, ip_address(client))


def _dial(call: Call) -> Arrival | str:
    try:
        if call.protocol is Protocol.UDP:
            v6 = call.destination.version == 6
            with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as one:
                if call.source is not None:
                    one.bind((str(call.source), 0))
                return ask(one, call.destination, call.port)
        connection, arrival = connect(call)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    connection.close()
    return arrival


def read_arrival(connection: socket.socket) -> Arrival:
    line = b""
    while not line.endswith(b"\n"):
        chunk = connection.recv(1)
        if not chunk:
            raise ConnectionResetError(errno.ECONNRESET, "closed before a line came")
        line += chunk
    verdict, destination, port, client = json.loads(line)
    return Arrival(Verdict(verdict), ip_address(destination), port, ip_address(client))


def _start(place: Place, listeners: Sequence[Listener], share: bool) -> BaseProcess:
    # multiprocessing's daemons end with pytest, should the node not have ended them before.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(place, listeners, share, theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(TIMEOUT), "the listeners do not come up"
    try:
        problem = ours.recv()
    except EOFError:
        problem = "they ended"
    finally:
        ours.close()
    assert problem == "", f"the listeners do not come up: {problem}"
    return process


def _serve(place: Place, listeners: Sequence[Listener], share: bool, ready: Any) -> None:
    selector = selectors.DefaultSelector()
    try:
        # Bound as root, because ports below 1024 are; run as whom the place says.
        place.enter()
        for verdict, port in listeners:
            for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                server = socket.socket(family, socket.SOCK_STREAM)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.bind((address, port))
                server.listen(128)
                selector.register(server, selectors.EVENT_READ, verdict)
                datagrams = _datagrams(family, address, port, share)
                selector.register(datagrams, selectors.EVENT_READ, verdict)
    except OSError as error:
        ready.send(str(error))
        os._exit(1)
    ready.send("")
    ready.close()
    while True:
        for key, _ in selector.select():
            stream: Any = key.fileobj
            if key.data is None:
                _echo(selector, stream)
            elif stream.type == socket.SOCK_DGRAM:
                _answer(stream, key.data)
            else:
                _accept(selector, stream, key.data)


def _datagrams(family: int, address: str, port: int, share: bool) -> socket.socket:
    server = socket.socket(family, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
    if family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        # The address asked may be of a range that is local by its route only.
        server.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    else:
        server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    server.bind((address, port))
    return server


def _answer(server: socket.socket, verdict: Verdict) -> None:
    _, ((level, kind, info),), _, client = server.recvmsg(4096, 128)
    # The address that was asked becomes the one to send from, by whatever interface: struct
    # in_pktinfo has it last, struct in6_pktinfo first.
    v4 = level == socket.IPPROTO_IP
    info = bytes(4) + info[8:12] + bytes(4) if v4 else info[:16] + bytes(4)
    answer = json.dumps([verdict, client[0]]).encode()
    server.sendmsg([answer], [(level, kind, info)], 0, client)


def _accept(selector: selectors.BaseSelector, server: socket.socket, verdict: Verdict) -> None:
    connection, client = server.accept()
    destination, port = _original_destination(connection)
    connection.sendall(json.dumps([verdict, destination, port, client[0]]).encode() + b"\n")
    selector.register(connection, selectors.EVENT_READ, None)


def _echo(selector: selectors.BaseSelector, connection: socket.socket) -> None:
    try:
        data = connection.recv(65536)
        if data:
            connection.sendall(data)
            return
    except OSError:
        pass
    selector.unregister(connection)
    connection.close()


def _original_destination(connection: socket.socket) -> tuple[str, int]:
    """As Envoy's original_dst listener filter asks: the local address where nothing is kept."""
    v6 = connection.family == socket.AF_INET6
    try:
        raw = connection.getsockopt(SOL_IPV6 if v6 else socket.SOL_IP, SO_ORIGINAL_DST, 28)
    except OSError:
        address, port = connection.getsockname()[:2]
        return address, port
    (port,) = struct.unpack_from("!H", raw, 2)
    if v6:
        return socket.inet_ntop(socket.AF_INET6, raw[8:24]), port
    return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
