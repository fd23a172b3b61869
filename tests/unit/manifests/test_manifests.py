"""What a cluster is given is what its API server takes, and what our programs understand."""

from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import trustme
import yaml
from deployed import AGENT, XDS_SERVER, Deployed
from xds_server import cli as xds_server
from xds_server.sources.resources import KINDS

from redirector import cli as redirector
from redirector.kubernetes.desired import Wish, desired
from redirector.kubernetes.objects import read_namespace, read_pod
from redirector.model import Mode, Steering

#: The oldest with appArmorProfile in the security context, and the newest that is known.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
POD = Path(__file__).parents[3] / "manifests" / "sidecar" / "pod.yaml"
BOTH = pytest.mark.parametrize("given", [AGENT, XDS_SERVER], ids=lambda given: given.name)


@BOTH
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_keeps_to_its_schema(given: Deployed, version: str) -> None:
    found = list(given.objects())
    assert len(found) >= 5
    for each in found:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pod_with_its_sidecar_keeps_to_its_schema(version: str) -> None:
    kubernetes_validate.validate(yaml.safe_load(POD.read_text()), version, strict=True)


def test_the_pod_with_its_sidecar_waits_first_and_fits_a_restricted_namespace() -> None:
    spec = yaml.safe_load(POD.read_text())["spec"]
    names = [each["name"] for each in spec["initContainers"]]
    assert names == ["await-steering", "bootstrap", "sidecar"]
    assert spec["initContainers"][-1]["restartPolicy"] == "Always"
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    users = []
    for container in (*spec["initContainers"], *spec["containers"]):
        context = container["securityContext"]
        users.append(context["runAsUser"])
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
    # The proxy's user is the sidecar's alone: who has it is not steered.
    proxy = Steering().proxy_uids
    assert [user in proxy for user in users] == [False, False, True, False]


@BOTH
def test_names_refer_to_what_is_there(given: Deployed) -> None:
    account, role = given.one("ServiceAccount"), given.one("ClusterRole")
    binding, workload = given.one("ClusterRoleBinding"), given.one(given.workload)
    namespace = given.one("Namespace")["metadata"]["name"]
    (subject,) = binding["subjects"]
    name = account["metadata"]["name"]
    assert subject == {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert given.pod()["serviceAccountName"] == name
    for each in given.objects():
        assert each["metadata"].get("namespace", namespace) == namespace
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"] == labels
    container = given.container()
    assert {v["name"] for v in given.pod()["volumes"]} == {
        m["name"] for m in container["volumeMounts"]
    }
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    annotations = workload["spec"]["template"]["metadata"]["annotations"]
    assert int(annotations["prometheus.io/port"]) in {
        port["containerPort"] for port in container["ports"]
    }


@BOTH
def test_our_own_pods_are_never_steered(given: Deployed) -> None:
    """They have no sidecar, and the default mode may be for all that do not say otherwise."""
    namespace = read_namespace(given.one("Namespace"))
    metadata = {"name": "x", "namespace": namespace.name, "uid": "x"}
    pod = read_pod({"metadata": metadata, "spec": given.pod(), "status": {}})
    found = desired([pod], {namespace.name: namespace}, Mode.EBPF)
    assert not any(isinstance(verdict, Wish) for verdict in found.values())


def arguments(given: Deployed, program: str) -> list[str]:
    container = given.container()
    named, *words = [*container["command"], *container["args"]]
    assert named == program
    return words


def ends_outside_of_a_cluster(
    main: Callable[[list[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line is understood up to the point where it would need a cluster."""
    assert main(words) == 5
    assert "is not a pod of a cluster" in capsys.readouterr().err


def test_the_agents_command_line_is_understood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(AGENT, "redirector")
    monkeypatch.setenv("NODE_NAME", "node-1")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    ends_outside_of_a_cluster(redirector.main, words, capsys)
    (port,) = (each["containerPort"] for each in AGENT.container()["ports"])
    assert f"--metrics=[::]:{port}" in words


def test_the_xds_servers_command_line_is_understood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    made = authority.issue_cert("xds-server.redirector-xds.svc")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    made.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
    made.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    mounts = {m["name"]: m["mountPath"] for m in XDS_SERVER.container()["volumeMounts"]}
    words = arguments(XDS_SERVER, "xds-server")
    ports = {port["name"]: port["containerPort"] for port in XDS_SERVER.container()["ports"]}
    assert f"--listen=[::]:{ports['xds']}" in words
    assert f"--status-address=[::]:{ports['status']}" in words
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    here = [
        word.replace(mounts["tls"], str(tmp_path)).replace(mounts["run"], str(tmp_path))
        for word in words
    ]
    ends_outside_of_a_cluster(xds_server.main, here, capsys)


def test_the_xds_server_may_do_what_it_does_and_no_more() -> None:
    done = set()
    for kind in KINDS:
        name = f"{kind.group}/{kind.plural}".lstrip("/")
        done |= {("list", name), ("watch", name)}
        if kind.told:
            done.add(("patch", f"{name}/status"))
    assert XDS_SERVER.allowed() == done


def test_the_xds_server_keeps_no_privilege() -> None:
    pod, container = XDS_SERVER.pod(), XDS_SERVER.container()
    assert XDS_SERVER.capabilities() == []
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    namespace = XDS_SERVER.one("Namespace")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_xds_server_is_more_than_one_and_reachable() -> None:
    deployment, service = XDS_SERVER.one("Deployment")["spec"], XDS_SERVER.one("Service")["spec"]
    disruption = XDS_SERVER.one("PodDisruptionBudget")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["replicas"] > disruption["maxUnavailable"]
    assert service["selector"] == disruption["selector"]["matchLabels"] == labels
    (port,) = service["ports"]
    assert port["targetPort"] in {each["name"] for each in XDS_SERVER.container()["ports"]}
