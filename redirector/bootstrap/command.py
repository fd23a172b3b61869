"""`redirector bootstrap`: prints what a sidecar's Envoy is started with."""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from redirector.bootstrap import XdsTls, bootstrap, sds_files, xds_host
from redirector.bootstrap.outside import READY_PATH, READY_PORT, STATS_PATH, STATS_PORT
from redirector.bootstrap.values import Json
from redirector.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `run` reads."""
    parser.add_argument("pod", metavar="POD", help="its name, or NAMESPACE/NAME")
    parser.add_argument("--namespace", help="of the pod (default: default)")
    parser.add_argument("--ip", help="the pod's own address (default: that of the enrolled POD)")
    parser.add_argument(
        "--xds",
        default="unix:/run/redirector/xds.sock",
        metavar="ADDRESS",
        help="the xDS server: unix:PATH or HOST:PORT (default: %(default)s)",
    )
    parser.add_argument("--admin-port", type=int, default=15000, metavar="PORT")
    for flag, port, path in (
        ("--ready-port", READY_PORT, READY_PATH),
        ("--stats-port", STATS_PORT, STATS_PATH),
    ):
        text = f"serve {path} here, on the pod's address; 0: nowhere (default: %(default)s)"
        parser.add_argument(flag, type=int, default=port, metavar="PORT", help=text)
    for flag, text in (
        ("--xds-ca", "who signs the xDS server's certificate (PEM): TLS"),
        ("--xds-cert", "the sidecar's own certificate (PEM)"),
        ("--xds-key", "its key (PEM)"),
        ("--xds-sds-dir", "write two files here, by which Envoy follows changes of the PEM files"),
    ):
        parser.add_argument(flag, type=Path, metavar="PATH", help=text)
    parser.add_argument(
        "--xds-server-name", help="in the xDS server's certificate (default: the host of --xds)"
    )


def run(arguments: argparse.Namespace, enrolled: Callable[[str], str], out: TextIO) -> int:
    """Print the bootstrap and write its SDS files; `enrolled` tells a pod's address."""
    namespace, _, name = arguments.pod.rpartition("/")
    tls = _tls(arguments)
    made = bootstrap(
        name,
        arguments.namespace or namespace or "default",
        arguments.ip or enrolled(arguments.pod),
        xds=arguments.xds,
        admin_port=arguments.admin_port,
        tls=tls,
        ready_port=arguments.ready_port,
        stats_port=arguments.stats_port,
    )
    if tls is not None and tls.sds_directory is not None:
        _write_files(sds_files(tls))
    json.dump(made, out, indent=2)
    out.write("\n")
    return 0


def _tls(arguments: argparse.Namespace) -> XdsTls | None:
    given = {
        "--xds-ca": arguments.xds_ca,
        "--xds-cert": arguments.xds_cert,
        "--xds-key": arguments.xds_key,
    }
    lacking = [option for option, path in given.items() if path is None]
    if len(lacking) == len(given):
        return None
    if lacking:
        raise InputError(f"bootstrap: TLS needs {' and '.join(lacking)}, too")
    name = arguments.xds_server_name or xds_host(arguments.xds)
    return XdsTls(
        arguments.xds_ca, arguments.xds_cert, arguments.xds_key, name, arguments.xds_sds_dir
    )


def _write_files(files: Mapping[Path, Json]) -> None:
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise InputError(
                f"--xds-sds-dir {path.parent}: {error.strerror}; give a directory to write to"
            ) from None
