"""The command: what it prints, and how it ends."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import grpc
import pytest
from apiserver import ApiServer, kubeconfig
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest
from waiting import eventually
from xds_server.cli import main
from xds_server.references import CLUSTER
from xds_server.sources.files import load

DEMO = Path(__file__).parents[3] / "manifests" / "demo"
COMMAND = Path(sys.executable).with_name("xds-server")


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "manifests"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_validate_says_how_many_objects_are_good(
    manifests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--manifests", str(manifests), "--validate"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(" objects, no problems\n")
    assert err == ""


def test_validate_says_what_has_no_effect(
    manifests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy of somebody else's kind, or a misspelt route, is no mistake but may be one."""
    edit(manifests / "route-web.yaml", "kind: HTTPRoute", "kind: HttpRoute")
    assert main(["--manifests", str(manifests), "--validate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ignored: HttpRoute demo/web (gateway.networking.k8s.io/v1)"
    assert lines[1:] == ["14 objects, no problems"]


def test_an_empty_path_is_not_the_working_directory(
    manifests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--manifests", ""], ["--manifests", str(manifests), "--events", ""]):
        with pytest.raises(SystemExit) as ended:
            main([*options, "--validate"])
        assert ended.value.code == 2
        assert f"argument {options[-2]}: is empty; give a path" in capsys.readouterr().err


def test_validate_prints_every_problem_at_once(
    manifests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(manifests / "route-web.yaml", "weight: 90", "weight: -1")
    edit(manifests / "service-web-v1.yaml", "port: 80", "port: 70000")
    (manifests / "broken.yaml").write_text("a: [b")
    assert main(["--manifests", str(manifests), "--validate"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    for file, value in (
        ("route-web.yaml", "-1"),
        ("service-web-v1.yaml", "70000"),
        ("broken.yaml", "is not YAML"),
    ):
        assert any(file in line and value in line for line in lines), (file, err)
    assert lines[-1].endswith(f"objects, {len(lines) - 1} problems")


def test_a_file_that_nobody_can_read_at_the_start_leaves_nothing_to_serve(
    manifests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be the one with the policies. Other mistakes harm only themselves."""
    (manifests / "policy-web.yaml").unlink()
    (manifests / "policy-web.yaml").symlink_to("policy-web.yaml")
    (manifests / "bad.yaml").write_text("{")
    assert main(["--manifests", str(manifests), "--listen", "127.0.0.1:0"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xds-server:")]
    assert said == [
        f"xds-server: {manifests}/policy-web.yaml: cannot be read: "
        "Too many levels of symbolic links",
        f"xds-server: 1 problem in {manifests}: nothing to serve",
    ]


def test_bad_manifests_at_a_strict_start_leave_nothing_to_serve(
    manifests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(manifests / "route-web.yaml", "weight: 90", "weight: -1")
    assert main(["--manifests", str(manifests), "--listen", "127.0.0.1:0", "--strict"]) == 1
    err = capsys.readouterr().err
    assert "HTTPRoute demo/web" in err
    assert f"1 problem in {manifests}: nothing to serve" in err


def test_missing_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ([], ["--validate"]):
        assert main(["--manifests", str(tmp_path / "none"), *extra]) == 2
        err = capsys.readouterr().err
        assert str(tmp_path / "none") in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--listen", "nowhere"], "--listen nowhere: not an address"),
        (["--listen", "0.0.0.0:18000"], "add --insecure-listen"),
        (["--admin", "0.0.0.0:18001"], "--admin 0.0.0.0:18001: not a loopback address"),
        (["--admin", "nowhere"], "--admin nowhere: not an address"),
        (["--status-address", "nowhere"], "--status-address nowhere: is not HOST:PORT"),
        (["--events", "/nowhere/events"], "--events /nowhere/events: No such file"),
        (["--events", "/"], "--events /: Is a directory; give a file"),
    ],
)
def test_bad_option_is_one_line(
    manifests: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["--manifests", str(manifests), *options]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_busy_port_is_one_line_in_the_log(manifests: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
        done = subprocess.run(
            [COMMAND, "--manifests", manifests, "--listen", address],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert f"--listen {address}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_in_good_order_and_the_socket_is_gone(
    manifests: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "xds.sock"
    command: list[str | Path] = [COMMAND, "--manifests", manifests, "--listen", f"unix:{path}"]
    # Of its own process group, as a terminal's Ctrl-C would otherwise reach the tests too.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0) as running:
        assert running.stderr is not None
        lines = iter(running.stderr.readline, "")
        assert any("serving" in line for line in lines)
        os.kill(running.pid, number)
        rest = running.stderr.read()
        assert running.wait(60) == 0
    assert "stopping" in rest
    assert "Traceback" not in rest
    assert not path.exists()


def test_not_ready_any_more_it_serves_until_the_delay_ends(manifests: Path, tmp_path: Path) -> None:
    """A second signal ends it sooner."""
    command: list[str | Path] = [COMMAND, "--manifests", manifests, "--drain-delay", "1h"]
    command += ["--listen", "127.0.0.1:0", "--status-address", "127.0.0.1:0"]
    log = tmp_path / "log"

    def said(pattern: str) -> re.Match[str]:
        return eventually(pattern, lambda: re.search(pattern, log.read_text()))

    def ready(port: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=60) as page:
                return int(page.status)
        except HTTPError as error:
            return error.code

    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as running:
        status, port = said(r"health on port (\d+)")[1], said(r"on 127\.0\.0\.1:(\d+)")[1]
        said("serving")
        assert ready(status) == 200
        running.send_signal(signal.SIGTERM)
        said("stopping in 3600 s: not ready any more, still serving")
        assert ready(status) == 503
        request = DeltaDiscoveryRequest(type_url=CLUSTER)
        request.node.id = "sidecar~10.77.0.10~client.demo~demo.svc.cluster.local"
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = AggregatedDiscoveryServiceStub(channel)
            call = stub.DeltaAggregatedResources(iter([request]), timeout=60)
            assert next(call).resources
            call.cancel()
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    assert "Traceback" not in log.read_text()


def test_a_cluster_that_does_not_answer_yet_is_waited_for(tmp_path: Path) -> None:
    """Nothing is served meanwhile, and a signal ends the waiting."""
    path = tmp_path / "xds.sock"
    with ApiServer() as cluster:
        config = kubeconfig(tmp_path, cluster.url, "secret")
        cluster.down()
        command: list[str | Path] = [COMMAND, "--kubernetes", "--kubeconfig", config]
        command += ["--listen", f"unix:{path}"]
        for arrives in (False, True):
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
                assert running.stderr is not None
                lines = iter(running.stderr.readline, "")
                assert any("API server: " in line and "refused" in line for line in lines)
                assert not path.exists()
                if arrives:
                    cluster.up()
                    assert any("serving" in line for line in lines)
                    assert path.exists()
                running.terminate()
                rest = running.stderr.read()
                assert running.wait(60) == 0
                assert "Traceback" not in rest


def test_outside_of_a_cluster_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], manifests: Path
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["--kubernetes"]) == 5
    err = capsys.readouterr().err
    assert "is not a pod of a cluster" in err
    assert err.endswith("name one with --kubeconfig, or use --manifests\n")
    assert main(["--manifests", str(manifests), "--kubeconfig", "x"]) == 2
    assert (
        capsys.readouterr().err == "xds-server: --kubeconfig: is for a cluster; add --kubernetes\n"
    )


def test_validate_asks_a_cluster_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ApiServer() as cluster:
        cluster.apply(*(each.data for each in load(DEMO)[0]))
        config = kubeconfig(tmp_path, cluster.url, "secret")
        assert main(["--kubernetes", "--kubeconfig", str(config), "--validate"]) == 0
    assert capsys.readouterr().out == "14 objects, no problems\n"
