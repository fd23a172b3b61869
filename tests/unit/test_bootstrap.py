"""The sidecar's bootstrap: Envoy takes it, and wrong input is named."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority

from redirector.bootstrap import XdsTls, bootstrap, sds_files
from redirector.cli import main
from redirector.errors import InputError
from redirector.machine import envoy_binary

ADDRESSES = {
    "unix:/run/redirector/xds.sock": {"pipe": {"path": "/run/redirector/xds.sock"}},
    "unix:///run/xds.sock": {"pipe": {"path": "/run/xds.sock"}},
    "127.0.0.1:18000": {"socket_address": {"address": "127.0.0.1", "port_value": 18000}},
    "[fd00::1]:18000": {"socket_address": {"address": "fd00::1", "port_value": 18000}},
    "xds.mesh.svc:1": {"socket_address": {"address": "xds.mesh.svc", "port_value": 1}},
}


def made(xds: str = "127.0.0.1:18000", **options: Any) -> Any:
    given = {"pod": "web-v1", "namespace": "shop", "ip": "10.77.0.3", **options}
    return json.loads(json.dumps(bootstrap(**given, xds=xds)))


@pytest.mark.parametrize("xds", ADDRESSES)
def test_envoy_takes_it(tmp_path: Path, xds: str) -> None:
    path = tmp_path / "bootstrap.json"
    path.write_text(json.dumps(made(xds, ready_port=15021, stats_port=15090)))
    argv: list[str | Path] = [envoy_binary(), "--mode", "validate", "-c", path, "-l", "warn"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize(("xds", "address"), ADDRESSES.items())
def test_xds_address(xds: str, address: dict[str, object]) -> None:
    (cluster,) = made(xds)["static_resources"]["clusters"]
    (locality,) = cluster["load_assignment"]["endpoints"]
    assert locality["lb_endpoints"] == [{"endpoint": {"address": address}}]
    assert cluster["type"] == ("STRICT_DNS" if "svc" in xds else "STATIC")


def test_who_the_sidecar_is_and_how_it_asks() -> None:
    config = made(admin_port=15999)
    assert config["node"] == {
        "id": "sidecar~10.77.0.3~web-v1.shop~shop.svc.cluster.local",
        "cluster": "web-v1.shop",
    }
    admin = config["admin"]["address"]["socket_address"]
    assert admin == {"address": "127.0.0.1", "port_value": 15999}
    ads = config["dynamic_resources"]["ads_config"]
    assert ads["api_type"] == "DELTA_GRPC"
    assert ads["set_node_on_first_message_only"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pod": "Web_1"}, "pod: 'Web_1' is not a Kubernetes name; use lower case"),
        ({"pod": ""}, "pod: '' is not a Kubernetes name"),
        ({"namespace": "a~b"}, "namespace: 'a~b' is not a Kubernetes name"),
        ({"ip": "10.77.0.300"}, "ip: '10.77.0.300' is not an IP address; give the pod's own"),
        ({"admin_port": 70000}, "admin port: 70000 is not in 0-65535"),
        ({"ready_port": -1}, "ready port: -1 is not in 0-65535"),
        ({"stats_port": 15000}, "ports [15000, 15000]: each is for one listener; give others"),
        ({"admin_port": 0, "ready_port": 1}, "admin port: 0 is no port for others to find"),
        ({"xds": "localhost"}, "xds: 'localhost' is not an address; use unix:/path, host:port"),
        ({"xds": "localhost:0"}, "xds: 'localhost:0' is not an address"),
        ({"xds": ":18000"}, "xds: ':18000' is not an address"),
        ({"xds": "::1:18000"}, "xds: '::1:18000' is not an address"),
        ({"xds": "[127.0.0.1]:18000"}, "xds: '[127.0.0.1]:18000' is not an address"),
        ({"xds": "unix:relative"}, "xds: 'unix:relative' is not an address"),
        ({"xds": "unix://host/path"}, "xds: 'unix://host/path' is not an address"),
        ({"xds": "unix:/" + "a" * 107}, "a socket's path has at most 107 bytes"),
    ],
)
def test_wrong_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        made(**options)
    assert message in str(caught.value)


@pytest.fixture
def tls(tmp_path: Path) -> XdsTls:
    authority = Authority()
    made = XdsTls(tmp_path / "ca.crt", tmp_path / "tls.crt", tmp_path / "tls.key", "xds.mesh.svc")
    made.ca.write_bytes(authority.pem)
    authority.issue("spiffe://cluster.local/ns/shop/sa/web").write(made.certificate, made.key)
    return made


@pytest.mark.parametrize("name", ["xds.mesh.svc", "10.0.0.1", "fd00::1"])
@pytest.mark.parametrize("sds", [False, True])
def test_envoy_takes_it_with_tls(tmp_path: Path, tls: XdsTls, name: str, sds: bool) -> None:
    options = replace(tls, server_name=name, sds_directory=tmp_path if sds else None)
    if sds:
        for file, content in sds_files(options).items():
            file.write_text(json.dumps(content))
    path = tmp_path / "bootstrap.json"
    path.write_text(json.dumps(made("xds.mesh.svc:18000", tls=options)))
    argv: list[str | Path] = [envoy_binary(), "--mode", "validate", "-c", path, "-l", "warn"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_server_must_have_the_name_that_was_dialled(
    tmp_path: Path, tls: XdsTls, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--xds", "[fd00::1]:1", "--xds-ca", str(tls.ca), "--xds-cert", str(tls.certificate)]
    options += ["--xds-key", str(tls.key), "--xds-sds-dir", str(tmp_path / "sds")]
    assert main(["bootstrap", "shop/web", "--ip", "10.0.0.1", *options]) == 0
    cluster, _ = json.loads(capsys.readouterr().out)["static_resources"]["clusters"]
    context = cluster["transport_socket"]["typed_config"]
    assert "sni" not in context
    trust = context["common_tls_context"]["combined_validation_context"]
    (name,) = trust["default_validation_context"]["match_typed_subject_alt_names"]
    assert name == {"san_type": "IP_ADDRESS", "matcher": {"exact": "fd00::1"}}
    files = sorted(path.name for path in (tmp_path / "sds").iterdir())
    assert files == ["xds-ca.json", "xds-certificate.json"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--xds-ca", "/a"], "bootstrap: TLS needs --xds-cert and --xds-key, too"),
        (
            ["--xds-ca", "/a", "--xds-cert", "b", "--xds-key", "/c"],
            "bootstrap: xds certificate: 'b': give an absolute path",
        ),
        (
            ["--xds", "unix:/a", "--xds-ca", "/a", "--xds-cert", "/b", "--xds-key", "/c"],
            "a Unix socket has no TLS; leave it out",
        ),
        (
            ["--xds-ca", "/a", "--xds-cert", "/b", "--xds-key", "/c", "--xds-sds-dir", "/dev/null"],
            "--xds-sds-dir /dev/null: File exists; give a directory to write to",
        ),
    ],
)
def test_wrong_tls_options_are_one_line(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pod = ["bootstrap", "web", "--ip", "10.0.0.1", "--xds", "10.0.0.9:1"]
    assert main([*pod, *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
