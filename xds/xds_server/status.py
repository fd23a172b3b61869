"""`xds-server status`: where each sidecar stands, asked of a running server."""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

import grpc
from envoy.service.status.v3.csds_pb2 import ClientStatusRequest, ClientStatusResponse

from redirector.errors import InputError, RedirectorError
from xds_server.csds import FETCH, SERVICE, decode
from xds_server.references import kind
from xds_server.standing import Standing, TypeStanding

DEFAULT_ADDRESS = "unix:/run/redirector/xds-admin.sock"
_PATIENCE_S = 10.0


class NoAnswer(RedirectorError):  # noqa: N818 - reads as the state it reports
    """No server answers at the address."""


def main(arguments: Sequence[str], out: TextIO) -> int:
    """Ask and print; returns the exit code. NoAnswer when there is nobody to ask."""
    parser = argparse.ArgumentParser(
        prog="xds-server status",
        description="Show where each sidecar stands with its configuration.",
    )
    parser.add_argument(
        "--address",
        default=DEFAULT_ADDRESS,
        metavar="ADDR",
        help="the server's --admin address (default: %(default)s)",
    )
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    show(fetch(options.address), options.output, out)
    return 0


def show(standings: Sequence[Standing], output: str, out: TextIO) -> None:
    """Print them; `output` is `text` or `json`."""
    now = time.time()
    if output == "json":
        json.dump([as_json(standing, now) for standing in standings], out, indent=2)
        out.write("\n")
    else:
        out.write(table(standings, now))


def fetch(address: str) -> list[Standing]:
    """Every sidecar of the server at this address."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/{FETCH}",
            request_serializer=ClientStatusRequest.SerializeToString,
            response_deserializer=ClientStatusResponse.FromString,
        )
        try:
            return list(decode(call(ClientStatusRequest(), timeout=_PATIENCE_S)))
        except grpc.RpcError as error:
            raise NoAnswer(
                f"--address {address}: {error.details()};"
                " is xds-server running, with this as --admin address?"
            ) from None
        except InputError as error:
            raise NoAnswer(f"--address {address}: {error}") from None


def table(standings: Iterable[Standing], now: float) -> str:
    """A line for each sidecar and type."""
    rows = [("SIDECAR", "TYPE", "STATE", "VERSION", "AGE", "LAST ERROR")]
    for standing in standings:
        name = f"{standing.node.namespace}/{standing.node.pod}"
        for found in standing.types:
            age = "-" if found.accepted_at is None else _age(now - found.accepted_at)
            row = (name, kind(found.type_url), found.sync.value, found.version or "-", age)
            rows.append((*row, _error(found, now)))
    if len(rows) == 1:
        return "no sidecar is connected\n"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _error(found: TypeStanding, now: float) -> str:
    if found.refused_at is None:
        return "-"
    # The sidecar's own words must not break the table.
    text = " ".join("".join(c if c.isprintable() else " " for c in found.error).split())
    return f"{_age(now - found.refused_at)} ago, {found.refused_version}: {text}"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def as_json(standing: Standing, now: float) -> dict[str, object]:
    """One sidecar as JSON; ages in seconds, null for what never happened."""
    node = standing.node
    return {
        "sidecar": f"{node.namespace}/{node.pod}",
        "ip": node.ip,
        "variant": standing.variant,
        "connected_s": _rounded(now, standing.connected_at),
        "types": {
            kind(found.type_url): {
                "state": found.sync.value,
                "version": found.version or None,
                "age_s": _rounded(now, found.accepted_at),
                "last_error": found.error or None,
                "last_error_version": found.refused_version or None,
                "last_error_age_s": _rounded(now, found.refused_at),
            }
            for found in standing.types
        },
    }


def _rounded(now: float, at: float | None) -> float | None:
    return None if at is None else round(max(0.0, now - at), 3)
