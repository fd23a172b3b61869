"""The `xds-server` command: Kubernetes objects become configuration of the sidecars."""

import argparse
import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

from redirector import output
from redirector.apiserver.client import Client, in_cluster
from redirector.apiserver.kubeconfig import from_file
from redirector.errors import InputError
from xds_server import options, status
from xds_server.following import Reader, count_in, follow
from xds_server.garbage import settle
from xds_server.ingest.scopes import Wishes
from xds_server.ir import NodeId
from xds_server.lineage import Lineage
from xds_server.listen import Address, UnixAddress, claim, open_to_sidecars
from xds_server.operating import Operating
from xds_server.options import Shell
from xds_server.push import Push, count
from xds_server.server import Server
from xds_server.sources.directory import Directory
from xds_server.sources.kubernetes import Kubernetes
from xds_server.sources.source import Source
from xds_server.telling import Telling
from xds_server.writing import Writer

log = logging.getLogger("xds_server")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 for bad manifests, 2 for bad options."""
    words = sys.argv[1:] if argv is None else argv

    def command(out: TextIO) -> int:
        if words and words[0] == "status":
            return status.main(words[1:], out)
        arguments = _parser().parse_args(words)
        if arguments.kubeconfig is not None and not arguments.kubernetes:
            raise InputError("--kubeconfig: is for a cluster; add --kubernetes")
        if arguments.validate:
            return asyncio.run(
                validate(_source(arguments), options.wishes(arguments), out, sys.stderr)
            )
        return _serve(arguments)

    return output.run("xds-server", command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xds-server",
        description="Serve Envoy sidecars from Kubernetes objects, over ADS.",
        epilog="`xds-server status` shows where each sidecar of a running server stands.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--manifests",
        type=_path,
        metavar="DIR",
        help="directory of *.yaml, *.yml and *.json files, watched for changes",
    )
    source.add_argument(
        "--kubernetes", action="store_true", help="follow the API server of the pod's own cluster"
    )
    parser.add_argument(
        "--kubeconfig",
        type=_path,
        metavar="FILE",
        help="with --kubernetes: follow the cluster of this file's current context instead",
    )
    parser.add_argument(
        "--read-only",
        action="store_true",
        help="with --kubernetes: do not write into objects' status what became of them",
    )
    options.add_to(parser)
    parser.add_argument(
        "--validate",
        action="store_true",
        help="check the objects, print what is ignored and every problem, and exit",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="do not start while anything is wrong with the objects (otherwise what is bad is "
        "left out, or stays as it last was good, and is logged)",
    )
    parser.add_argument(
        "--events", type=_path, metavar="FILE", help="append one JSON line for each push"
    )
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info"
    )
    return parser


def _path(text: str) -> Path:
    if not text:
        # Path("") would be the working directory: an unset variable must not choose it.
        raise argparse.ArgumentTypeError("is empty; give a path")
    return Path(text)


def _source(arguments: argparse.Namespace) -> Callable[[], Source]:
    """What makes the source, once an event loop runs."""
    if not arguments.kubernetes:
        return partial(Directory, arguments.manifests)
    if arguments.kubeconfig is not None:
        access = from_file(arguments.kubeconfig)
    else:
        access = in_cluster(os.environ, "name one with --kubeconfig, or use --manifests")
    return partial(Kubernetes, Client(access), access.url)


async def validate(make: Callable[[], Source], defaults: Wishes, out: TextIO, err: TextIO) -> int:
    """Check a source: 0, or 1 after one line for each problem."""
    found = await Reader(make(), defaults).read()
    mesh, objects = found.mesh, count(found.objects, "object")
    if found.problems:
        for problem in found.problems:
            print(problem, file=err)
        print(f"{objects}, {count(len(found.problems), 'problem')}", file=err)
        return 1
    made = Lineage().next(mesh)
    for name, workload in mesh.workloads.items():
        for address in workload.addresses[:1]:
            made.snapshot(NodeId(str(address), name.name, name.namespace))
    for ignored in mesh.ignored:
        print(f"ignored: {ignored}", file=out)
    print(f"{objects}, no problems", file=out)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    _start_log(arguments.log_level)
    _allow_many_files()
    shell = options.shell(arguments)
    report = _reporter(arguments.events)
    source = _source(arguments)
    defaults = options.wishes(arguments)
    writes = not arguments.read_only
    run = _run(source, shell, report, defaults, strict=arguments.strict, writes=writes)
    return asyncio.run(run)


def _allow_many_files() -> None:
    """Each sidecar is a file descriptor, and most systems begin with 1,024 for a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _reporter(path: Path | None) -> Callable[[Push], None]:
    if path is None:
        return lambda _: None
    try:
        path.open("ab").close()
    except OSError as error:
        raise InputError(f"--events {path}: {error.strerror}; give a file to append to") from error

    def append(push: Push) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{push.event()}\n")
        except OSError as error:
            log.warning("--events %s: %s; the push is not recorded", path, error.strerror)

    return append


async def _run(
    make: Callable[[], Source],
    shell: Shell,
    report: Callable[[Push], None],
    defaults: Wishes,
    *,
    strict: bool,
    writes: bool,
) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopped = asyncio.create_task(stop.wait())
    operating = Operating()
    if shell.status_address is not None:
        port = operating.serve_http(shell.status_address)
        log.info("metrics and health on port %d", port)
    reader = Reader(make(), defaults)
    # A cluster may take its time.
    reading = asyncio.create_task(reader.read())
    await asyncio.wait({stopped, reading}, return_when=asyncio.FIRST_COMPLETED)
    if not reading.done():
        return 0
    found = reading.result()
    # Of a file that nobody could read so far there is no last good form either, and it may be the
    # one with the policies. Sidecars keep what they have while nothing is served.
    hopeless = [problem for problem in found.problems if strict or problem.opaque]
    if hopeless:
        for problem in hopeless:
            print(f"xds-server: {problem}", file=sys.stderr)
        problems = count(len(hopeless), "problem")
        print(f"xds-server: {problems} in {reader.source}: nothing to serve", file=sys.stderr)
        return 1
    reader.note(found)
    for address in shell.listens:
        claim(address)
    log.info("%s read from %s", count(found.objects, "object"), reader.source)
    lineage = Lineage()
    server = Server(
        lineage.next(found.mesh),
        report=report,
        limits=shell.limits,
        trust_domain=shell.trust_domain,
    )
    server.know(found.mesh.workloads)
    count_in(found, server)
    tasks = []
    telling = Telling()
    if isinstance(reader.source, Kubernetes):
        server.tally.hindrances = reader.source.problems
        if writes:
            writer = Writer(reader.source, server.refused, socket.gethostname())
            telling = Telling(writer.want)
            tasks.append(asyncio.create_task(writer.run()))
    telling.tell(found.mesh)
    for address in shell.listens:
        _listen(server, address, shell)
    if shell.admin is not None:
        log.info("status on %s", await operating.serve_admin(shell.admin))
    settle()
    await server.start()
    operating.tell_of(server, lambda: telling.outcomes(server.refused()))
    log.info("serving")
    tasks.append(asyncio.create_task(follow(reader, lineage, server, telling)))
    if shell.credentials:
        tasks.append(asyncio.create_task(shell.credentials.watch()))
    try:
        await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()  # it ends by an error of ours only: better no server than a deaf one
        await _retire(server, shell.drain_delay_s, stop)
    finally:
        log.info("stopping")
        for task in tasks:
            task.cancel()
        await server.stop()
        await operating.stop()
        for address in shell.listens:
            if isinstance(address, UnixAddress):
                address.path.unlink(missing_ok=True)
    return 0


async def _retire(server: Server, delay: float, stop: asyncio.Event) -> None:
    """Give load balancers time to send nobody more; a second signal ends it."""
    server.retire()
    if delay:
        log.info("stopping in %g s: not ready any more, still serving", delay)
        stop.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), delay)


def _listen(server: Server, address: Address, shell: Shell) -> None:
    # A Unix socket is guarded by the permissions of its folder.
    encrypted = shell.credentials is not None and not isinstance(address, UnixAddress)
    try:
        port = server.listen(str(address), shell.server_credentials() if encrypted else None)
    except RuntimeError as error:
        raise InputError(f"--listen {address}: {error}; use another address") from error
    if isinstance(address, UnixAddress):
        barred = open_to_sidecars(address.path)
        if barred is not None:
            log.warning("%s: sidecars cannot reach it, %s is closed to others", address, barred)
        log.info("listening on %s", address)
    else:
        how = " with client certificates" if encrypted else ""
        log.info("listening on %s%s", replace(address, port=port), how)


class _OneLine(logging.Formatter):
    """What clients say must not break or forge lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return " ".join(super().formatMessage(record).split())


def _start_log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(level.upper())
