"""`python -m xds_server.bench.command`: every figure, a line each."""

import argparse
import dataclasses
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from redirector.errors import RedirectorError
from xds_server.bench.clients import Variant
from xds_server.bench.measure import Case, Result, Round, measure
from xds_server.bench.objects import Size
from xds_server.bench.report import told

#: Services, and endpoints of each. A thousand of a thousand are more than clusters have pods.
_MESHES = ((1, 10), (1, 1000), (1000, 10))
#: From small to large.
CASES = (
    *(
        Case(Size(clients, *mesh), variant)
        for clients in (100, 1000)
        for mesh in _MESHES
        for variant in Variant
    ),
    Case(Size(1000, 100, 1000), Variant.DELTA),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(prog="bench-xds", description=__doc__)
    for name in ("clients", "services", "endpoints"):
        parser.add_argument(f"--{name}", type=int, help="one case of this size instead of all")
    parser.add_argument("--variant", type=Variant, choices=list(Variant), default=Variant.DELTA)
    parser.add_argument("--rounds", type=int, default=10, help="changes (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    given = parser.parse_args(argv)
    numbers = (given.clients, given.services, given.endpoints)
    if any(numbers) and not all(number and 1 <= number <= 10_000 for number in numbers):
        parser.error("give --clients, --services and --endpoints together, from 1 to 10000 each")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: give 1 or more")
    cases = (Case(Size(*numbers), given.variant),) if any(numbers) else CASES
    # A socket for each client, in the server's process and in theirs.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    results: list[Result] = []
    try:
        for case in cases:
            results.append(measure(case, given.rounds, _progress))
            for line in told(results[-1]):
                print(line, flush=True)
    except RedirectorError as error:
        print(f"bench-xds: {error}", file=sys.stderr)
        return error.exit_code
    if given.json:
        given.json.write_text(json.dumps([_plain(result) for result in results], indent=2) + "\n")
    return 0


def _progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _plain(result: Result) -> dict[str, object]:
    rounds: dict[str, tuple[Round, ...]] = {str(c): r for c, r in result.rounds.items()}
    return dataclasses.asdict(dataclasses.replace(result, rounds={})) | {
        "rounds": {
            name: [dataclasses.asdict(one) for one in found] for name, found in rounds.items()
        }
    }


if __name__ == "__main__":
    sys.exit(main())
