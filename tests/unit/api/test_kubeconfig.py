"""A kubeconfig file gives access to its current context's server, or one line why not."""

import base64
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from apiserver import ApiServer

from redirector.apiserver.client import ApiError, Client
from redirector.apiserver.kubeconfig import from_file
from redirector.errors import InputError


def written(path: Path, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    other = {"server": "https://other"}
    content = {
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "mine", "user": "me"}}],
        "clusters": [{"name": "other", "cluster": other}, {"name": "mine", "cluster": cluster}],
        "users": [{"name": "me", "user": user}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_client_certificate_in_the_file_is_ours(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    mine = authority.issue_cert("me@example.com")
    with ApiServer(tls=context) as server:
        cluster = {
            "server": server.url,
            "certificate-authority-data": encoded(authority.cert_pem.bytes()),
        }
        user = {
            "client-certificate-data": encoded(mine.cert_chain_pems[0].bytes()),
            "client-key-data": encoded(mine.private_key_pem.bytes()),
        }
        client = Client(from_file(written(tmp_path / "config", cluster, user)))
        assert client.get("/api/v1/pods", {})["kind"] == "PodList"
        stranger = Client(from_file(written(tmp_path / "config", cluster, {})))
        with pytest.raises(ApiError):
            stranger.get("/api/v1/pods", {})


def test_a_token_and_files_beside_it(tmp_path: Path) -> None:
    with ApiServer() as server:
        path = written(tmp_path / "config", {"server": f"{server.url}/"}, {"token": "secret"})
        Client(from_file(path)).get("/api/v1/pods", {})
        (tmp_path / "token").write_text("beside\n")
        path = written(tmp_path / "config", {"server": server.url}, {"tokenFile": "token"})
        Client(from_file(path)).get("/api/v1/pods", {})
        assert [r.authorization for r in server.requests] == ["Bearer secret", "Bearer beside"]
    access = from_file(
        written(tmp_path / "config", {"server": "https://a", "certificate-authority": "ca"}, {})
    )
    assert access.ca_file == tmp_path / "ca"


@pytest.mark.parametrize(
    ("cluster", "user", "says"),
    [
        ({}, {}, "cluster.server: is missing"),
        ({"server": "here"}, {}, "cluster.server: 'here' is not a URL"),
        ({"server": "https://a", "insecure-skip-tls-verify": True}, {}, "certificate-authority"),
        ({"server": "https://a"}, {"exec": {"command": "aws"}}, "user.exec: is not supported"),
        ({"server": "https://a"}, {"client-key-data": "%"}, "user.client-key-data: is not base64"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], says: str
) -> None:
    path = written(tmp_path / "config", cluster, user)
    with pytest.raises(InputError, match=f"kubeconfig {path}: .*{says}"):
        from_file(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [("[", "is not YAML"), ("- a", "it: must be a mapping"), ("{}", "current-context: is missing")],
)
def test_what_is_none_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config"
    with pytest.raises(InputError, match="No such file"):
        from_file(path)
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        from_file(path)
