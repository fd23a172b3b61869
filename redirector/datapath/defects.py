"""Tries out what the running kernel does with redirected bytes, before any pod depends on it.

Works on two connected loopback sockets of this process and the loaded maps: the sockets get their
state, a flow and their places in the sockhash from here, instead of from the sockops program.
"""

import array
import fcntl
import socket
import termios
from ipaddress import IPv4Address

from redirector.datapath import libbpf
from redirector.datapath.layout import (
    Address,
    Defect,
    Flow,
    FlowFlag,
    FlowKey,
    Side,
    SockState,
)

#: The maps that `find_defects` wants descriptors of, in its order.
PROBED = ("states", "flows", "sockets")
_SENT, _READ = 100, 60
_ID = 1
_SO_COOKIE = 57  # asm-generic/socket.h; Python has no name for it


def find_defects(states: int, flows: int, sockets: int) -> Defect:
    """What is wrong; Defect(0) when redirected bytes are told of and counted as TCP's own."""
    client, server = _connected()
    # No namespace has this cookie, so this flow meets no other.
    key = FlowKey(netns=2**64 - 1, client=_address(client), server=_address(server))
    key.client_port, key.server_port = client.getsockname()[1], server.getsockname()[1]
    with client, server:
        try:
            flow = Flow(id=_ID, flags=FlowFlag.ACCELERATE)
            for side, end in ((Side.CLIENT, client), (Side.SERVER, server)):
                descriptor = end.fileno().to_bytes(4, "little")
                cookie = end.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
                flow.socket[side] = int.from_bytes(cookie, "little")
                state = SockState(flow=key, id=_ID, side=side, flags=FlowFlag.ACCELERATE)
                libbpf.map_update(states, descriptor, bytes(state))
                libbpf.map_update(sockets, cookie, descriptor)
            libbpf.map_update(flows, bytes(key), bytes(flow))
            return _try(flows, key, client, server)
        finally:
            libbpf.map_delete(flows, bytes(key))


def _try(flows: int, key: FlowKey, client: socket.socket, server: socket.socket) -> Defect:
    found = Defect(0)
    client.sendall(bytes(_SENT))
    if _flow(flows, key).bytes[Side.CLIENT] != _SENT:
        raise OSError("the sk_msg program did not redirect what was sent")
    if _readable(server) != _SENT:
        found |= Defect.FIONREAD
    server.recv(_READ)
    server.sendall(b"x")
    if _flow(flows, key).unread[Side.SERVER] != _SENT - _READ:
        found |= Defect.UNREAD
    return found


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=5)
        server, _ = listener.accept()
    server.settimeout(5)
    return client, server


def _address(end: socket.socket) -> Address:
    return Address.of(IPv4Address(end.getsockname()[0]))


def _flow(flows: int, key: FlowKey) -> Flow:
    raw = libbpf.map_lookup(flows, bytes(key), len(bytes(Flow())))
    if raw is None:
        raise OSError("the flows map lost its entry")
    return Flow.from_buffer_copy(raw)


def _readable(end: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(end.fileno(), termios.FIONREAD, count)
    return count[0]
