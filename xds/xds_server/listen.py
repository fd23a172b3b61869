"""Where the server listens: TCP addresses, Unix sockets for sidecars, one for its operator."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from redirector.errors import InputError
from redirector.serving import every_address

_UNIX = "unix:"
#: sun_path of unix(7) holds 108 bytes with the final zero.
_MAX_PATH_BYTES = 107
#: A sidecar runs as a user of its own (1337) and must be able to connect.
_SOCKET_MODE = 0o666
_DIRECTORY_MODE = 0o755


@dataclass(frozen=True)
class TcpAddress:
    """`host` is an IP address or `localhost`; port 0 is any free one."""

    host: str
    port: int
    option: str = field(default="--listen", compare=False)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host == "localhost" or ip_address(self.host).is_loopback


@dataclass(frozen=True)
class UnixAddress:
    """A Unix socket by its absolute path."""

    path: Path
    option: str = field(default="--listen", compare=False)

    def __str__(self) -> str:
        return f"{_UNIX}{self.path}"


Address = TcpAddress | UnixAddress


def parse(
    text: str, *, insecure: bool = False, encrypted: bool = False, option: str = "--listen"
) -> Address:
    """Read an address as `option` gives it.

    `127.0.0.1:18000`, `[::1]:18000`, `localhost:18000` or `unix:/path`; `[::]` stands for every
    address of both families.

    InputError on anything else, and off loopback unless it is `encrypted` or `insecure` is asked
    for by name.
    """
    if text.startswith(_UNIX):
        return _unix(text, option)
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise _bad(text, option)
    try:
        if host != "localhost" and (ip_address(host).version == 6) != bracketed:
            raise ValueError
    except ValueError:
        raise _bad(text, option) from None
    address = TcpAddress(every_address(host), int(port), option)
    if not (address.loopback or insecure or encrypted):
        raise InputError(
            f"{option} {text}: not a loopback address, and the protocol is not encrypted;"
            " use a Unix socket or --tls-cert, or add --insecure-listen to allow it"
        )
    return address


def _unix(text: str, option: str) -> UnixAddress:
    path = text.removeprefix(_UNIX)
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path.startswith("/") or path.startswith("//") or path.endswith("/"):
        raise _bad(text, option)
    if len(path.encode()) > _MAX_PATH_BYTES:
        raise InputError(
            f"{option} {text}: a socket's path has at most {_MAX_PATH_BYTES} bytes; shorten it"
        )
    return UnixAddress(Path(path), option)


def _bad(text: str, option: str) -> InputError:
    return InputError(
        f"{option} {text}: not an address; use 127.0.0.1:18000, [::1]:18000 or unix:/path/to.sock"
    )


def claim(address: Address) -> None:
    """Make sure that nobody holds the address and prepare the place for a socket.

    gRPC says neither why it cannot bind nor that it takes a living server's socket away.
    """
    try:
        if isinstance(address, UnixAddress):
            _claim_socket(address)
        else:
            _claim_port(address)
    except OSError as error:
        raise InputError(
            f"{address.option} {address}: {error.strerror};"
            " use another address or stop what holds it"
        ) from error


def _claim_port(address: TcpAddress) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address.host, address.port))
        # SO_REUSEADDR lets a bind beside a listener pass, a listen not.
        probe.listen()


def _claim_socket(address: UnixAddress) -> None:
    path = address.path
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        path.parent.chmod(_DIRECTORY_MODE)
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise InputError(f"{address.option} {address}: exists and is no socket; use another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise InputError(
                f"{address.option} {address}: another server listens there;"
                " stop it or use another path"
            )
    path.unlink()


@contextmanager
def private() -> Iterator[None]:
    """Sockets that are made within are for their owner alone, from their first moment."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def open_to_sidecars(path: Path) -> Path | None:
    """Let every user connect to a socket; returns the folder that bars others from it, if any."""
    path.chmod(_SOCKET_MODE)
    folders = (folder for folder in path.parents if not folder.stat().st_mode & stat.S_IXOTH)
    return next(folders, None)
