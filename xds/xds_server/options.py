"""How a user says what the shell around the state machines does: addresses, TLS, limits."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import grpc

from redirector.errors import InputError
from xds_server.admission import Limits
from xds_server.identity import DEFAULT_TRUST_DOMAIN
from xds_server.ingest.scopes import (
    ALLOW_ANY,
    IMPORTS,
    OUTBOUND_POLICY,
    REGISTRY_ONLY,
    Wishes,
    parse_imports,
)
from xds_server.ir import Scope
from xds_server.listen import Address, parse
from xds_server.operating import admin_address
from xds_server.tls import Credentials, TlsFiles

DEFAULT_LISTEN = "127.0.0.1:18000"
_DEFAULTS = Limits()
_DRAIN_DELAY_S = 5.0
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Shell:
    """What was chosen; without credentials TCP addresses are plaintext."""

    listens: tuple[Address, ...]
    admin: Address | None
    status_address: str | None
    limits: Limits
    trust_domain: str
    drain_delay_s: float
    credentials: Credentials | None

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For gRPC's ports."""
        return None if self.credentials is None else self.credentials.server_credentials()


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ADDR",
        help="host:port, on loopback unless encrypted, or unix:/path; may be repeated"
        f" (default {DEFAULT_LISTEN})",
    )
    parser.add_argument(
        "--insecure-listen",
        action="store_true",
        help="allow --listen addresses that other machines reach, unencrypted",
    )
    tls = parser.add_argument_group(
        "TLS", "With these, TCP addresses are encrypted and clients must bring a certificate."
    )
    files = (
        ("--tls-cert", "the server's certificate chain (PEM); read again when it changes"),
        ("--tls-key", "its key (PEM, no password)"),
        ("--client-ca", "who signs the certificates of sidecars (PEM)"),
    )
    for option, text in files:
        tls.add_argument(option, type=_file, metavar="FILE", help=text)
    tls.add_argument(
        "--trust-domain",
        default=DEFAULT_TRUST_DOMAIN,
        metavar="NAME",
        help="of the service accounts in certificates: spiffe://NAME/ns/NAMESPACE/sa/ACCOUNT"
        " (default: %(default)s)",
    )
    operator = parser.add_argument_group("for the operator")
    operator.add_argument(
        "--admin",
        metavar="ADDR",
        help="serve `xds-server status` (CSDS) here: unix:/path, for the server's own user, or"
        " loopback host:port (default: xds-admin.sock beside a --listen unix:/path/xds.sock)",
    )
    operator.add_argument(
        "--status-address",
        metavar="ADDR",
        help="serve /metrics, /healthz and /readyz over HTTP here, host:port",
    )
    operator.add_argument(
        "--drain-delay",
        type=_delay,
        metavar="TIME",
        help="when it is to stop, go on serving for so long while /readyz fails already, so that "
        "load balancers send it nobody more (default: 5s with --status-address, else 0s)",
    )
    mesh = parser.add_argument_group("mesh", "Annotations of namespaces and pods say otherwise.")
    mesh.add_argument(
        "--imports",
        type=_imports,
        metavar="LIST",
        help="what sidecars are told of beyond their own namespace: '*' for every service "
        "(default), '.' for no other, or NAMESPACE and NAMESPACE/SERVICE with commas between them "
        f"(annotation {IMPORTS})",
    )
    mesh.add_argument(
        "--outbound-policy",
        choices=(ALLOW_ANY, REGISTRY_ONLY),
        default=ALLOW_ANY,
        help="whether applications reach what is no service of theirs, too (default: %(default)s; "
        f"annotation {OUTBOUND_POLICY})",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-clients",
        type=_number,
        default=_DEFAULTS.clients,
        metavar="N",
        help="so many sidecars at a time (default: %(default)s)",
    )
    limits.add_argument(
        "--connect-rate",
        type=_number,
        default=int(_DEFAULTS.connects),
        metavar="N",
        help="so many new ones a second, twice as many at once (default: %(default)s)",
    )
    limits.add_argument(
        "--max-stream-age",
        type=_age,
        default=_DEFAULTS.stream_age_s,
        metavar="TIME",
        help="let sidecars come anew after at most 90s, 30m, 12h (default: 30m)",
    )


def _drain_delay(arguments: argparse.Namespace) -> float:
    """Nobody notices that the server is not ready any more where nobody can ask it."""
    if arguments.drain_delay is not None:
        return float(arguments.drain_delay)
    return _DRAIN_DELAY_S if arguments.status_address is not None else 0.0


def shell(arguments: argparse.Namespace) -> Shell:
    """What the arguments ask for. InputError: files that cannot be used, or one without others."""
    limits = Limits(
        clients=arguments.max_clients,
        connects=float(arguments.connect_rate),
        stream_age_s=arguments.max_stream_age,
    )
    credentials = _credentials(arguments)
    encrypted, insecure = credentials is not None, arguments.insecure_listen
    texts = arguments.listen or [DEFAULT_LISTEN]
    listens = tuple(parse(text, insecure=insecure, encrypted=encrypted) for text in texts)
    admin = admin_address(arguments.admin, listens)
    domain, delay = arguments.trust_domain, _drain_delay(arguments)
    return Shell(listens, admin, arguments.status_address, limits, domain, delay, credentials)


def wishes(arguments: argparse.Namespace) -> Wishes:
    """What holds where no annotation says otherwise."""
    return Wishes(arguments.imports, arguments.outbound_policy == REGISTRY_ONLY)


def _imports(text: str) -> Scope:
    found = parse_imports(text)
    if not isinstance(found, Scope):
        raise argparse.ArgumentTypeError(
            f"{found!r} is not '*', '.', NAMESPACE or NAMESPACE/SERVICE"
        )
    return found


def _credentials(arguments: argparse.Namespace) -> Credentials | None:
    given = {
        "--tls-cert": arguments.tls_cert,
        "--tls-key": arguments.tls_key,
        "--client-ca": arguments.client_ca,
    }
    lacking = [option for option, path in given.items() if path is None]
    if len(lacking) == len(given):
        return None
    if lacking:
        there = next(option for option, path in given.items() if path is not None)
        raise InputError(f"{there}: needs {' and '.join(lacking)} beside it")
    return Credentials(TlsFiles(arguments.tls_cert, arguments.tls_key, arguments.client_ca))


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a file")
    return Path(text)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000000")
    return int(text)


def _age(text: str) -> float:
    return _time(text, 1)


def _delay(text: str) -> float:
    return _time(text, 0)


def _time(text: str, least: int) -> float:
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdecimal() and unit in _UNITS):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m or 12h")
    seconds = int(number) * _UNITS[unit]
    if not least <= seconds <= 24 * 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not between {least}s and 24h")
    return float(seconds)
