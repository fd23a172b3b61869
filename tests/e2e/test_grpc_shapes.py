"""gRPC's own xDS client and server: it refuses nothing of what any mesh gives it, and a server that
wants its listener from us, which would have no policies, does not begin to serve."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from waiting import PATIENCE_S
from xds_server.generation import Generation
from xds_server.ingest import ingest
from xds_server.ir import Client, Mesh, NodeId
from xds_server.references import LISTENER
from xds_server.server import Server
from xds_server.sources.files import parse
from xds_server.standing import Sync
from xds_server.translate import translate

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "xds").glob("*.in.yaml"))
PEERS = Path(__file__).with_name("grpc_peers.py")
FULL = re.compile(r"[^.]+[.][^.]+:\d+")
NODE = "sidecar~10.0.0.1~web.demo~demo.svc.cluster.local"


def meshes() -> Mapping[str, tuple[Mesh, NodeId]]:
    """Those of the golden files, each with the pod that it is looked at from."""
    found = {}
    for file in GOLDEN:
        text = file.read_text()
        node = NodeId.parse(text.splitlines()[0].removeprefix("# node: "))
        found[file.name] = (ingest(parse(file.name, text)[0])[0], node._replace(client=Client.GRPC))
    return found


@asynccontextmanager
async def served(place: Path, generation: Generation) -> AsyncIterator[Server]:
    server = Server(generation, report=lambda _: None)
    server.listen(f"unix:{place}/xds.sock")
    await server.start()
    try:
        yield server
    finally:
        await server.stop(grace=0)


class Peer:
    """A gRPC program in a network of its own, in which nothing but itself can be reached."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())

    async def line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await self._process.stdout.readline()).decode()


@asynccontextmanager
async def peer(place: Path, *arguments: str) -> AsyncIterator[Peer]:
    bootstrap = place / "grpc.json"
    server = {
        "server_uri": f"unix:{place}/xds.sock",
        "channel_creds": [{"type": "insecure"}],
        "server_features": ["xds_v3"],
    }
    bootstrap.write_text(
        json.dumps(
            {
                "xds_servers": [server],
                "node": {"id": NODE},
                "server_listener_resource_name_template": "grpc/server?address=%s",
            }
        )
    )
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"),
        *(sys.executable, PEERS, *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "GRPC_XDS_BOOTSTRAP": str(bootstrap)},
    )
    try:
        yield Peer(process)
    finally:
        process.kill()
        await process.wait()


async def refused(server: Server) -> list[str]:
    """What clients say against what they have, once they have answered everything."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            types = [each for standing in server.standings() for each in standing.types]
            if not any(each.sync is Sync.STALE for each in types):
                return [each.error for each in types if each.error]
            await asyncio.sleep(0.01)


async def test_no_mesh_has_anything_that_grpc_refuses(place: Path) -> None:
    async with served(place, Generation(lambda _: {})) as server, peer(place, "call") as caller:
        for name, (mesh, node) in meshes().items():
            resources = translate(mesh, node)
            await server.publish(Generation(lambda _, made=resources: made), name, time.time())
            # By one of its names each, since they differ in nothing else.
            targets = [name for name in resources[LISTENER] if FULL.fullmatch(name)]
            for target in targets:
                caller.write(f"xds:///{target} /demo.Greeter/Hello 1\n")
            for target in targets:
                assert json.loads(await caller.line()) == {"UNAVAILABLE": 1}, target
            assert await refused(server) == [], name
        assert sum(server.tally.nacks.values()) == 0


async def test_a_server_that_wants_its_listener_from_us_does_not_serve(place: Path) -> None:
    mesh, node = meshes()["grpc.in.yaml"]
    address = "127.0.0.1:8080"
    async with (
        served(place, Generation(lambda _: translate(mesh, node))) as server,
        peer(place, "serve-xds", "web", address) as asking,
    ):
        assert await asking.line() == "ready\n"
        assert json.loads(await asking.line()) == {"UNAVAILABLE": 1}
        # It may have tried its own listener before it was taken in here.
        async with asyncio.timeout(30):
            while not server.standings():
                await asyncio.sleep(0.02)
        assert await refused(server) == []
