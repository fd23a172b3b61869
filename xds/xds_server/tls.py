"""TLS with client certificates, from files that may change while the server runs.

gRPC asks for the certificate at every handshake, so a change takes effect with the next
connection; connections that are open keep what they began with until they reach their age.
"""

import asyncio
import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from redirector.errors import InputError

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 10.0


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the server's certificate chain and its key, and who may sign clients'."""

    certificate: Path
    key: Path
    client_ca: Path

    def named(self) -> tuple[tuple[str, Path], ...]:
        """Each with the option that gave it."""
        return (
            ("--tls-cert", self.certificate),
            ("--tls-key", self.key),
            ("--client-ca", self.client_ca),
        )


#: What tells one state of a file from another: inode, size, time of change (ns); None: not there.
_State = tuple[int, int, int] | None


class Credentials:
    """The files' content as gRPC wants it; what is bad never takes the place of what is good.

    InputError when the files are no good at the start.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._states()
        self._good = self._used = _load(files)
        #: The files changed to something that cannot be used.
        self.stale = False

    def server_credentials(self) -> grpc.ServerCredentials:
        """For add_secure_port: clients must bring a certificate that the CA signed."""
        # The stubs lack that the fetcher may say None.
        return grpc.dynamic_ssl_server_credentials(
            self._good,
            self.renewed,  # type: ignore[arg-type]
            require_client_authentication=True,
        )

    def renewed(self) -> "grpc.ServerCertificateConfiguration | None":
        """What to use from now on, or None to go on with what is in use. From any thread."""
        self.look()
        with self._lock:
            if self._good is self._used:
                return None
            self._used = self._good
            return self._good

    def look(self) -> None:
        """See whether the files changed, and say so. From any thread."""
        with self._lock:
            states = self._states()
            if states == self._seen:
                return
            self._seen = states
            try:
                self._good = _load(self._files)
            except InputError as error:
                self.stale = True
                log.error("%s; the former certificate stays in use", error)
                return
            self.stale = False
            log.info("certificate read again from %s", self._files.certificate)

    async def watch(self) -> None:
        """Look every few seconds, so that a bad file is told before a sidecar connects."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await asyncio.to_thread(self.look)

    def _states(self) -> tuple[_State, ...]:
        return tuple(_state(path) for _, path in self._files.named())


def _state(path: Path) -> _State:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def _load(files: TlsFiles) -> "grpc.ServerCertificateConfiguration":
    content = {option: _read(option, path) for option, path in files.named()}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password would be asked for on the terminal; the empty one is just wrong.
        context.load_cert_chain(files.certificate, files.key, password="")
    except ssl.SSLError as error:
        raise InputError(
            f"--tls-cert {files.certificate}, --tls-key {files.key}: {_reason(error)};"
            " give a PEM certificate and the unencrypted key that belongs to it"
        ) from None
    # Comments around the certificates may be anything.
    signers = content["--client-ca"].decode("ascii", "replace").replace("\ufffd", "?")
    try:
        context.load_verify_locations(cadata=signers)
    except (ssl.SSLError, ValueError) as error:
        reason = _reason(error) if isinstance(error, ssl.SSLError) else "no certificate in it"
        raise InputError(
            f"--client-ca {files.client_ca}: {reason}; give the PEM certificates of those who sign"
            " the clients'"
        ) from None
    if any(content[option] != _read(option, path) for option, path in files.named()):
        raise InputError(f"--tls-cert {files.certificate}: changes while it is read; try again")
    return grpc.ssl_server_certificate_configuration(
        [(content["--tls-key"], content["--tls-cert"])], root_certificates=content["--client-ca"]
    )


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}; give a PEM file") from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "not PEM").lower().replace("_", " ")
