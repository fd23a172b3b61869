"""What the operator is told: where sidecars stand, metrics, health."""

import asyncio
import io
import json
import stat
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import grpc
import pytest
from clients import PATIENCE_S, ack, answer, connected, first, running
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest
from envoy.service.status.v3.csds_pb2 import (
    ClientStatusRequest,
    ClientStatusResponse,
    ConfigStatus,
)
from envoy.service.status.v3.csds_pb2_grpc import ClientStatusDiscoveryServiceStub
from prometheus_client.parser import text_string_to_metric_families
from worlds import world
from xds_server import csds, status
from xds_server.conditions import Condition, ObjectStatus, ParentStatus, Reference
from xds_server.ir import NodeId
from xds_server.listen import UnixAddress, parse
from xds_server.operating import Operating, admin_address
from xds_server.references import CLUSTER, ENDPOINT, FILTER, LISTENER, ROUTE
from xds_server.standing import Standing, Sync, TypeStanding

from redirector.cli import main as redirector
from redirector.errors import InputError

NODE = NodeId("10.0.0.1", "web", "demo")
LACKS = {"reason": "BackendNotFound", "message": "there is no Service demo/v2"}
ACCEPTED = Condition("Accepted", True, "Accepted")
OBJECTS = [
    ObjectStatus(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        "demo",
        "web",
        parents=(
            ParentStatus(
                Reference(None, "Service", None, "web", port=80),
                (ACCEPTED, Condition("ResolvedRefs", False, **LACKS)),
            ),
        ),
    ),
    ObjectStatus("policy.redirector.io/v1alpha1", "TrafficPolicy", "demo", "fast", 3, (ACCEPTED,)),
]


@asynccontextmanager
async def operated(tmp_path: Path) -> AsyncIterator[tuple[Any, Any, Operating, str]]:
    """A running server, a stub of its clients, and its admin address."""
    operating = Operating()
    async with running() as (run, stub):
        address = await operating.serve_admin(UnixAddress(tmp_path / "xds-admin.sock"))
        operating.tell_of(run.server, lambda: OBJECTS)
        yield run, stub, operating, str(address)
        await operating.stop()


async def fetch(address: str) -> list[Standing]:
    return list((await asyncio.to_thread(status.fetch, address)).sidecars)


async def states(address: str) -> dict[str, Sync]:
    (found,) = await fetch(address)
    assert found.node == NODE
    return {each.type_url: each.sync for each in found.types}


async def test_each_type_stands_where_its_answers_say(tmp_path: Path) -> None:
    async with operated(tmp_path) as (run, stub, _, address):
        assert await fetch(address) == []
        call = stub.DeltaAggregatedResources()
        await call.write(first(CLUSTER))
        response = await answer(call)
        assert await states(address) == {
            CLUSTER: Sync.STALE,
            ENDPOINT: Sync.NOT_SENT,
            LISTENER: Sync.NOT_SENT,
            ROUTE: Sync.NOT_SENT,
            FILTER: Sync.NOT_SENT,
        }
        await call.write(ack(response))
        # A round trip: what was written before it has been read.
        await call.write(first(LISTENER))
        listeners = await answer(call)
        assert (await states(address))[CLUSTER] is Sync.SYNCED
        await call.write(ack(listeners, "no such filter"))
        await call.write(first(ROUTE, resource_names_subscribe=["to-web"]))
        await answer(call)
        assert await states(address) == {
            CLUSTER: Sync.SYNCED,
            ENDPOINT: Sync.NOT_SENT,
            LISTENER: Sync.NACKED,
            ROUTE: Sync.STALE,
            FILTER: Sync.NOT_SENT,
        }
        (found,) = await fetch(address)
        by_type = {each.type_url: each for each in found.types}
        assert by_type[CLUSTER].version == response.system_version_info
        assert by_type[LISTENER].error == "in kept back: no such filter"
        assert by_type[LISTENER].refused_version == listeners.system_version_info
        # What was accepted is overtaken.
        await run.publish(world(clusters={"web": 1}))
        await answer(call)
        assert (await states(address))[CLUSTER] is Sync.STALE


async def test_what_may_not_be_tried_in_parts_stands_refused_as_a_whole(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, stub, _, address):
        call = stub.StreamAggregatedResources()
        request = DiscoveryRequest(type_url=CLUSTER, version_info="of-an-earlier-time")
        request.node.id = first(CLUSTER).node.id
        await call.write(request)
        request.response_nonce = (await answer(call)).nonce
        request.error_detail.message = "no"
        await call.write(request)
        # A round trip.
        await call.write(DiscoveryRequest(type_url=LISTENER))
        await answer(call)
        (found,) = await fetch(address)
        (clusters,) = (each for each in found.types if each.type_url == CLUSTER)
        assert clusters.sync is Sync.NACKED
        assert clusters.error == "all of it refused, to be sent again with the next change: no"


async def test_sidecar_that_is_back_with_everything_is_synced(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, stub, _, address):
        one = stub.DeltaAggregatedResources()
        await one.write(first(CLUSTER))
        had = await answer(one)
        one.cancel()
        known = {resource.name: resource.version for resource in had.resources}
        two = stub.DeltaAggregatedResources()
        await two.write(first(CLUSTER, initial_resource_versions=known))
        greeting = await answer(two)
        assert not greeting.resources
        await two.write(ack(greeting))
        await two.write(first(LISTENER))
        await answer(two)
        found = [each for each in await fetch(address) if each.types[2].sync is Sync.STALE]
        (back,) = found
        cluster = back.types[0]
        assert (cluster.type_url, cluster.sync) == (CLUSTER, Sync.SYNCED)
        assert cluster.version == had.system_version_info


async def test_csds_streams_and_matches_by_node_id(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, stub, _, address):
        await connected(stub)
        await connected(stub, "sidecar~10.0.0.2~api.demo~demo.svc.cluster.local")
        async with grpc.aio.insecure_channel(address) as channel:
            call = ClientStatusDiscoveryServiceStub(channel).StreamClientStatus()

            async def ids(request: ClientStatusRequest) -> list[str]:
                await call.write(request)
                return [config.node.id.split("~")[2] for config in (await answer(call)).config]

            assert await ids(ClientStatusRequest()) == ["api.demo", "web.demo"]
            request = ClientStatusRequest()
            request.node_matchers.add().node_id.prefix = "sidecar~10.0.0.2~"
            assert await ids(request) == ["api.demo"]
            request.node_matchers.add().node_id.contains = "~WEB."
            request.node_matchers[1].node_id.ignore_case = True
            assert await ids(request) == ["api.demo", "web.demo"]
            request = ClientStatusRequest()
            request.node_matchers.add().node_id.safe_regex.regex = ".*"
            await call.write(request)
            code = await asyncio.wait_for(call.code(), PATIENCE_S)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "node_id.safe_regex: not supported; use exact, prefix" in await call.details()


async def test_sidecars_address_tells_nobody_of_others() -> None:
    async with (
        running() as (run, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{run.port}") as channel,
    ):
        call = ClientStatusDiscoveryServiceStub(channel).FetchClientStatus(ClientStatusRequest())
        assert await asyncio.wait_for(call.code(), PATIENCE_S) is grpc.StatusCode.UNIMPLEMENTED


async def test_admin_socket_is_its_owners_alone(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, _, _, address):
        mode = Path(address.removeprefix("unix:")).stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
    assert not Path(address.removeprefix("unix:")).exists()


def test_standings_survive_the_wire() -> None:
    refused = TypeStanding(ROUTE, Sync.NACKED, "v1", 1700000000.5, "bad", "v2", 1700000001.25)
    never = TypeStanding(CLUSTER, Sync.NOT_SENT)
    standing = Standing(NODE, "sotw", 1699999999.125, (refused, never))
    response = csds.encode(ClientStatusRequest(), [standing])
    again = ClientStatusResponse.FromString(response.SerializeToString())
    assert list(csds.decode(again)) == [standing]
    states = [entry.config_status for entry in again.config[0].generic_xds_configs]
    assert states == [ConfigStatus.ERROR, ConfigStatus.NOT_SENT]


def test_table_has_a_line_for_each_type_and_the_sidecars_words_do_not_break_it() -> None:
    refused = TypeStanding(ROUTE, Sync.NACKED, "v1", 940.0, "bad\n\x1b[2Jroute", "v2", 990.0)
    never = TypeStanding(CLUSTER, Sync.NOT_SENT)
    lines = status.table([Standing(NODE, "delta", 900.0, (refused, never))], 1000.0).splitlines()
    assert [line.split() for line in lines] == [
        ["SIDECAR", "TYPE", "STATE", "VERSION", "AGE", "LAST", "ERROR"],
        ["demo/web", "route", "NACKED", "v1", "1m", "10s", "ago,", "v2:", "bad", "[2Jroute"],
        ["demo/web", "cluster", "NOT", "SENT", "-", "-", "-"],
    ]


async def test_both_commands_show_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with operated(tmp_path) as (_, stub, _, address):
        await connected(stub)
        out = io.StringIO()
        options = ["--address", address, "-o", "json"]
        assert await asyncio.to_thread(status.main, options, out) == 0
        told = json.loads(out.getvalue())
        (sidecar,) = told["sidecars"]
        assert [(each["kind"], each["name"]) for each in told["objects"]] == [
            ("HTTPRoute", "web"),
            ("TrafficPolicy", "fast"),
        ]
        assert told["objects"][0]["parents"] == [
            {
                "parentRef": {"kind": "Service", "name": "web", "port": 80},
                "conditions": [
                    {"type": "Accepted", "status": "True", "reason": "Accepted", "message": ""},
                    {"type": "ResolvedRefs", "status": "False", **LACKS},
                ],
            }
        ]
        assert (sidecar["sidecar"], sidecar["variant"]) == ("demo/web", "delta")
        assert set(sidecar["types"]) == {"cluster", "endpoints", "listener", "route", "filter"}
        assert sidecar["types"]["listener"]["state"] == "NOT SENT"
        assert await asyncio.to_thread(redirector, ["proxy-status", "--address", address]) == 0
        text = capsys.readouterr().out
        assert "demo/web  cluster" in text
        # What is as it should be is not told.
        assert text.partition("\n\n")[2].splitlines() == [
            f"{'OBJECT':47}  CONDITION         REASON           MESSAGE",
            "HTTPRoute demo/web for Service demo/web port 80  not ResolvedRefs  BackendNotFound  "
            "there is no Service demo/v2",
        ]


def test_nobody_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"unix:{tmp_path}/none.sock"
    assert redirector(["proxy-status", "--address", address]) == 1
    error = capsys.readouterr().err
    assert f"--address {address}: " in error
    assert "is xds-server running, with this as --admin address?" in error
    assert error.count("\n") == 1


def test_admin_address_is_beside_the_socket_unless_it_is_given() -> None:
    listens = [parse("127.0.0.1:18000"), parse("unix:/run/a/xds.sock")]
    assert str(admin_address(None, listens)) == "unix:/run/a/xds-admin.sock"
    assert admin_address(None, listens[:1]) is None
    assert str(admin_address("127.0.0.1:1", listens)) == "127.0.0.1:1"
    with pytest.raises(InputError, match=r"--admin 0\.0\.0\.0:1: not a loopback address"):
        admin_address("0.0.0.0:1", listens)


async def page(port: int, path: str) -> tuple[int, str]:
    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as found:
                return found.status, found.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(get)


async def test_ready_with_the_first_mesh_and_until_it_stops() -> None:
    operating = Operating()
    port = operating.serve_http("127.0.0.1:0")
    assert await page(port, "/healthz") == (200, "ok\n")
    assert await page(port, "/readyz") == (503, "no mesh yet\n")
    assert (await page(port, "/metrics"))[0] == 503
    async with running() as (run, _):
        operating.tell_of(run.server, lambda: OBJECTS)
        assert await page(port, "/readyz") == (200, "ok\n")
    assert await page(port, "/readyz") == (503, "stopping\n")


async def test_metrics_count_pushes_answers_sizes_refusals() -> None:
    operating = Operating()
    port = operating.serve_http("127.0.0.1:0")
    async with running() as (run, stub):
        operating.tell_of(run.server, lambda: OBJECTS)
        call = await connected(stub)
        await run.publish(world(clusters={"web": 1}))
        response = await answer(call)
        await call.write(ack(response, "no"))
        await run.report()
        # A type of the client's own making must not become a label of ours.
        await call.write(first("type.googleapis.com/made.Up"))
        stranger = stub.DeltaAggregatedResources()
        await stranger.write(first(CLUSTER, "nobody"))
        await asyncio.wait_for(stranger.code(), PATIENCE_S)
        code, text = await page(port, "/metrics")
    assert code == 200
    samples = {
        (sample.name.removeprefix("redirector_xds_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples[("clients",)] == 1
    assert samples[("clients_refused_total", "node-id")] == 1
    assert samples[("clients_refused_total", "max-clients")] == 0
    assert samples[("nacks_total", "cluster")] == 1
    assert samples[("ack_seconds_count", "cluster")] == 2
    assert samples[("push_seconds_count",)] == 1
    assert samples[("push_seconds_bucket", "+Inf")] == 1
    assert samples[("response_bytes_count", "cluster")] >= 2
    assert samples[("response_bytes_sum", "cluster")] > len(response.SerializeToString())
    # The world's four resources, and all four again of the changed one, which shares nothing.
    assert samples[("encodings_total",)] == 8
    assert "made.Up" not in text
