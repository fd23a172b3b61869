"""`xds-server status`: where each sidecar stands, and what became of objects, asked of a running
server."""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

import grpc
from envoy.service.status.v3.csds_pb2 import ClientStatusRequest, ClientStatusResponse

from redirector.errors import InputError, RedirectorError
from xds_server import objects
from xds_server.conditions import ObjectStatus
from xds_server.csds import FETCH, SERVICE, decode
from xds_server.errors import printable
from xds_server.references import kind
from xds_server.standing import Standing, TypeStanding

DEFAULT_ADDRESS = "unix:/run/redirector/xds-admin.sock"
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class State:
    """What a server tells its operator."""

    sidecars: tuple[Standing, ...]
    objects: tuple[ObjectStatus, ...]


class NoAnswer(RedirectorError):  # noqa: N818 - reads as the state it reports
    """No server answers at the address."""


def main(arguments: Sequence[str], out: TextIO) -> int:
    """Ask and print; returns the exit code. NoAnswer when there is nobody to ask."""
    parser = argparse.ArgumentParser(
        prog="xds-server status",
        description="Show where each sidecar stands with its configuration, and each condition of "
        "the objects that is not as it should be.",
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


def show(found: State, output: str, out: TextIO) -> None:
    """Print it; `output` is `text` or `json`."""
    now = time.time()
    if output == "json":
        content = {
            "sidecars": [as_json(standing, now) for standing in found.sidecars],
            "objects": [objects.as_json(each) for each in found.objects],
        }
        json.dump(content, out, indent=2)
        out.write("\n")
    else:
        out.write(table(found.sidecars, now))
        out.write(complaints(found.objects))


def fetch(address: str) -> State:
    """Every sidecar of the server at this address, and what became of its objects."""
    # Ten thousand sidecars are more than gRPC's 4 MiB.
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        sidecars = channel.unary_unary(
            f"/{SERVICE}/{FETCH}",
            request_serializer=ClientStatusRequest.SerializeToString,
            response_deserializer=ClientStatusResponse.FromString,
        )
        outcomes = channel.unary_unary(
            f"/{objects.SERVICE}/{objects.FETCH}",
            request_serializer=bytes,
            response_deserializer=objects.decode,
        )
        try:
            return State(
                tuple(decode(sidecars(ClientStatusRequest(), timeout=_PATIENCE_S))),
                tuple(outcomes(b"", timeout=_PATIENCE_S)),
            )
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
    return _aligned(rows) if len(rows) > 1 else "no sidecar is connected\n"


def complaints(statuses: Iterable[ObjectStatus]) -> str:
    """A line for each condition that is not as it should be; nothing if there is none."""
    rows: list[tuple[str, ...]] = [("OBJECT", "CONDITION", "REASON", "MESSAGE")]
    for whose, condition in objects.complaints(statuses):
        what = condition.type if condition.status else f"not {condition.type}"
        rows.append((printable(whose), what, condition.reason, printable(condition.message)))
    return f"\n{_aligned(rows)}" if len(rows) > 1 else ""


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
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
