"""What a cluster is given is what its API server takes, and what the agent understands."""

import agent_manifests
import kubernetes_validate
import pytest

from redirector.cli import main

#: The oldest with appArmorProfile in the security context, and the newest that is known.
VERSIONS = ("1.30", kubernetes_validate.latest_version())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_keeps_to_its_schema(version: str) -> None:
    found = list(agent_manifests.objects())
    assert len(found) >= 5
    for each in found:
        kubernetes_validate.validate(each, version, strict=True)


def test_names_refer_to_what_is_there() -> None:
    account, role = agent_manifests.one("ServiceAccount"), agent_manifests.one("ClusterRole")
    binding, daemons = agent_manifests.one("ClusterRoleBinding"), agent_manifests.one("DaemonSet")
    namespace = agent_manifests.one("Namespace")["metadata"]["name"]
    (subject,) = binding["subjects"]
    name = account["metadata"]["name"]
    assert subject == {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    spec = daemons["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == name
    assert daemons["metadata"]["namespace"] == account["metadata"]["namespace"] == namespace
    assert {v["name"] for v in spec["volumes"]} == {
        m["name"] for m in agent_manifests.container()["volumeMounts"]
    }


def test_the_command_line_is_understood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the point where it would need a cluster."""
    container = agent_manifests.container()
    program, *words = [*container["command"], *container["args"]]
    assert program == "redirector"
    monkeypatch.setenv("NODE_NAME", "node-1")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(words) == 5
    assert "is not a pod of a cluster" in capsys.readouterr().err
    (port,) = (each["containerPort"] for each in container["ports"])
    assert f"--metrics=0.0.0.0:{port}" in words
