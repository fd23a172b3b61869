"""The xDS port over TLS: who gets in, as whom, and what happens when the files change."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Leaf
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest
from worlds import world
from xds_server.cli import main
from xds_server.generation import Generation
from xds_server.ir import Name, Workload
from xds_server.references import CLUSTER
from xds_server.server import Server
from xds_server.tls import Credentials, TlsFiles

from redirector.errors import InputError

PATIENCE_S = 20.0
WEB, ACCOUNT = Name("demo", "web"), "spiffe://cluster.local/ns/demo/sa/web"
PODS = {WEB: Workload(WEB, service_account="web")}
NODE = "sidecar~10.0.0.1~web.demo~demo.svc.cluster.local"


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> TlsFiles:
    made = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt")
    made.client_ca.write_bytes(authority.pem)
    authority.issue("localhost", "127.0.0.1").write(made.certificate, made.key)
    return made


@asynccontextmanager
async def serving(credentials: Credentials) -> AsyncIterator[tuple[Server, int]]:
    server = Server(Generation(lambda _: world()), report=lambda _: None)
    server.know(PODS)
    port = server.listen("127.0.0.1:0", credentials.server_credentials())
    await server.start()
    try:
        yield server, port
    finally:
        await server.stop(grace=0)


@asynccontextmanager
async def client(port: int, trusted: bytes, own: Leaf | None) -> AsyncIterator[Any]:
    """A stream that has asked for clusters, on a connection of its own."""
    pair = (own.key, own.certificate) if own else (None, None)
    credentials = grpc.ssl_channel_credentials(trusted, *pair)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        call = AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources()
        request = DeltaDiscoveryRequest(type_url=CLUSTER)
        request.node.id = NODE
        await call.write(request)
        yield call


async def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    code: grpc.StatusCode = await asyncio.wait_for(call.code(), PATIENCE_S)
    return code, await call.details()


async def is_served(port: int, trusted: bytes, own: Leaf | None) -> bool:
    try:
        async with client(port, trusted, own) as call:
            response = await asyncio.wait_for(call.read(), PATIENCE_S)
            return [resource.name for resource in response.resources] == ["web"]
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return False


@pytest.mark.parametrize("name", [ACCOUNT, "web.demo"])
async def test_pods_own_certificate_gets_its_configuration(
    files: TlsFiles, authority: Authority, name: str
) -> None:
    async with serving(Credentials(files)) as (_, port):
        assert await is_served(port, authority.pem, authority.issue(name))


async def test_another_pods_certificate_is_refused_in_one_line(
    files: TlsFiles, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    own = authority.issue("spiffe://cluster.local/ns/demo/sa/other")
    async with serving(Credentials(files)) as (_, port), client(port, authority.pem, own) as call:
        code, text = await outcome(call)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "the certificate is that of spiffe://cluster.local/ns/demo/sa/other" in text
    assert f"refused a client: {text}" in caplog.text


async def test_strangers_and_the_nameless_do_not_get_in(
    files: TlsFiles, authority: Authority
) -> None:
    async with serving(Credentials(files)) as (_, port):
        assert not await is_served(port, authority.pem, Authority().issue(ACCOUNT))
        assert not await is_served(port, authority.pem, None)
        assert not await is_served(port, Authority().pem, authority.issue(ACCOUNT))
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            call = AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources()
            assert (await outcome(call))[0] is grpc.StatusCode.UNAVAILABLE
        assert await is_served(port, authority.pem, authority.issue(ACCOUNT))


async def test_changed_files_are_used_for_the_next_connection_and_the_open_one_stays(
    files: TlsFiles, authority: Authority
) -> None:
    later = Authority()
    async with (
        serving(Credentials(files)) as (_, port),
        client(port, authority.pem, authority.issue(ACCOUNT)) as call,
    ):
        await asyncio.wait_for(call.read(), PATIENCE_S)
        later.issue("127.0.0.1").write(files.certificate, files.key)
        files.client_ca.write_bytes(later.pem)
        assert await is_served(port, later.pem, later.issue(ACCOUNT))
        assert not await is_served(port, later.pem, authority.issue(ACCOUNT))
        again = DeltaDiscoveryRequest(type_url=CLUSTER, resource_names_subscribe=["web"])
        await call.write(again)
        response = await asyncio.wait_for(call.read(), PATIENCE_S)
        assert [resource.name for resource in response.resources] == ["web"]


async def test_bad_new_file_leaves_the_former_in_use_and_is_told_once(
    files: TlsFiles, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = Credentials(files)
    own = authority.issue(ACCOUNT)
    async with serving(credentials) as (_, port):
        files.key.write_bytes(authority.issue("127.0.0.1").key)
        assert await is_served(port, authority.pem, own)
        assert await is_served(port, authority.pem, own)
        assert credentials.stale
        (line,) = (r.message for r in caplog.records if r.name == "xds_server.tls")
        assert f"--tls-key {files.key}: key values mismatch; give" in line
        assert line.endswith("; the former certificate stays in use")
        authority.issue("127.0.0.1").write(files.certificate, files.key)
        assert await is_served(port, authority.pem, own)
        assert not credentials.stale


async def test_pod_whose_account_changes_is_let_go(files: TlsFiles, authority: Authority) -> None:
    async with (
        serving(Credentials(files)) as (server, port),
        client(port, authority.pem, authority.issue(ACCOUNT)) as call,
    ):
        await asyncio.wait_for(call.read(), PATIENCE_S)
        server.know(PODS)
        await call.write(DeltaDiscoveryRequest(type_url=CLUSTER, resource_names_subscribe=["web"]))
        await asyncio.wait_for(call.read(), PATIENCE_S)
        server.know({WEB: Workload(WEB, service_account="other")})
        assert await asyncio.wait_for(call.code(), PATIENCE_S) is grpc.StatusCode.OK
        assert not await is_served(port, authority.pem, authority.issue(ACCOUNT))


@pytest.mark.parametrize(
    ("which", "content", "says"),
    [
        ("certificate", b"", "--tls-cert {path}, --tls-key"),
        ("key", b"not a key", "give a PEM certificate and the unencrypted key"),
        ("client_ca", b"", "--client-ca {path}: no certificate in it; give the PEM"),
        ("client_ca", b"\xff\xff", "--client-ca {path}: "),
        ("client_ca", None, "--client-ca {path}: No such file or directory; give a PEM file"),
        ("key", None, "--tls-key {path}: No such file or directory; give a PEM file"),
    ],
)
def test_bad_file_at_the_start_is_named(
    files: TlsFiles, which: str, content: bytes | None, says: str
) -> None:
    path: Path = getattr(files, which)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        Credentials(files)
    assert says.format(path=path) in str(refused.value)


def test_all_three_files_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--manifests", "/nowhere", "--tls-key", "/k"]) == 2
    assert "--tls-key: needs --tls-cert and --client-ca beside it" in capsys.readouterr().err
