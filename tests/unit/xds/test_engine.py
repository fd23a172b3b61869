"""Which of gRPC's engines serves sockets."""

import subprocess
import sys

import pytest

SERVE = """
import xds_server, asyncio, grpc
async def serve():
    server = grpc.aio.server()
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
    await server.stop(None)
asyncio.run(serve())
"""


@pytest.mark.parametrize(
    ("experiments", "listener"),
    [(None, "tcp_server_posix.cc"), ("event_engine_listener", "posix_engine_listener.cc")],
)
def test_the_older_engine_serves_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, experiments: str | None, listener: str
) -> None:
    """gRPC tells it in its trace, by the source file that a line comes from."""
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    if experiments is not None:
        monkeypatch.setenv("GRPC_EXPERIMENTS", experiments)
    monkeypatch.setenv("GRPC_VERBOSITY", "debug")
    monkeypatch.setenv("GRPC_TRACE", "tcp,event_engine,event_engine_endpoint")
    done = subprocess.run(
        [sys.executable, "-c", SERVE], capture_output=True, text=True, timeout=60, check=True
    )
    told = {name for name in ("tcp_server_posix.cc", "posix_engine_listener.cc")
            if name in done.stderr}  # fmt: skip
    assert told == {listener}
