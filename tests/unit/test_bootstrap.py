"""The sidecar's bootstrap: Envoy takes it, and wrong input is named."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from redirector.bootstrap import bootstrap
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
    path.write_text(json.dumps(made(xds)))
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
