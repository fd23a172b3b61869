"""What a server tells its operator: CSDS on the admin address, metrics and health over HTTP.

Neither is for sidecars. The admin address is a Unix socket of the server's own user, or loopback.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grpc

from redirector.errors import InputError
from redirector.serving import Page
from redirector.serving import Server as HttpServer
from xds_server import csds, objects
from xds_server.conditions import ObjectStatus
from xds_server.listen import Address, TcpAddress, UnixAddress, claim, parse, private
from xds_server.metrics import CONTENT_TYPE
from xds_server.server import Server
from xds_server.standing import Standing

#: An event loop that does not come round for so long is not alive.
_HANGING_S = 10.0


def admin_address(text: str | None, listens: Sequence[Address]) -> Address | None:
    """Where CSDS is served: as `--admin` says, else beside the first Unix socket; None: nowhere."""
    if text is not None:
        return parse(text, option="--admin")
    for address in listens:
        if isinstance(address, UnixAddress):
            path = address.path
            return UnixAddress(path.with_name(f"{path.stem}-admin{path.suffix}"), "--admin")
    return None


class Operating:
    """Begins before there is a mesh, so that who asks learns that there is none yet."""

    def __init__(self) -> None:
        self._server: Server | None = None
        self._outcomes: Callable[[], Iterable[ObjectStatus]] = tuple
        self._grpc: grpc.aio.Server | None = None
        self._socket: Path | None = None

    def serve_http(self, address: str) -> int:
        """Serve /metrics, /healthz and /readyz from now on; returns the port. InputError."""
        loop = asyncio.get_running_loop()

        def page(ask: Callable[[], Awaitable[Page]]) -> Callable[[], Page]:
            def answer() -> Page:
                if loop.is_closed():
                    return Page(503, b"stopping\n")
                asked = asyncio.run_coroutine_threadsafe(_coroutine(ask), loop)
                try:
                    return asked.result(_HANGING_S)
                except TimeoutError:
                    asked.cancel()
                    text = f"the event loop has not come round for {_HANGING_S:g} s\n"
                    return Page(503, text.encode())

            return answer

        pages = {"/metrics": self._metrics, "/healthz": self._health, "/readyz": self._readiness}
        server = HttpServer(
            address, {path: page(ask) for path, ask in pages.items()}, "--status-address"
        )
        server.start()
        return server.port

    async def serve_admin(self, address: Address) -> Address:
        """Serve CSDS; returns the address with its port. InputError."""
        claim(address)
        self._grpc = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._grpc.add_generic_rpc_handlers((csds.handlers(self._standings), self._objects()))
        try:
            with private():
                port = self._grpc.add_insecure_port(str(address))
        except RuntimeError as error:
            raise InputError(f"--admin {address}: {error}; use another address") from error
        await self._grpc.start()
        if isinstance(address, TcpAddress):
            return TcpAddress(address.host, port, address.option)
        self._socket = address.path
        return address

    def tell_of(self, server: Server, outcomes: Callable[[], Iterable[ObjectStatus]]) -> None:
        """There is a mesh, and this server serves it; `outcomes` tells what became of objects."""
        self._server, self._outcomes = server, outcomes

    async def stop(self) -> None:
        """End CSDS; HTTP ends with the process, so that it can be seen to stop."""
        if self._grpc is not None:
            await self._grpc.stop(None)
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    def _objects(self) -> "grpc.GenericRpcHandler[Any, Any]":
        async def fetch(_request: bytes, _context: Any) -> bytes:
            return objects.encode(self._outcomes())

        handler = grpc.unary_unary_rpc_method_handler(fetch)
        return grpc.method_handlers_generic_handler(objects.SERVICE, {objects.FETCH: handler})

    def _standings(self) -> list[Standing]:
        return self._server.standings() if self._server else []

    async def _metrics(self) -> Page:
        if self._server is None:
            return Page(503, b"no mesh yet\n")
        return Page(200, self._server.metrics(), CONTENT_TYPE)

    async def _health(self) -> Page:
        return Page(200, b"ok\n")

    async def _readiness(self) -> Page:
        if self._server is None:
            return Page(503, b"no mesh yet\n")
        if self._server.retired:
            return Page(503, b"stopping\n")
        return Page(200, b"ok\n")


async def _coroutine(ask: Callable[[], Awaitable[Page]]) -> Page:
    return await ask()
