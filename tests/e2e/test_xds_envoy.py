"""Real Envoys take their configuration from the real server over its Unix socket."""

from collections.abc import Callable
from pathlib import Path

from running import Sidecar, XdsServer
from waiting import eventually

Serve = Callable[[], XdsServer]
StartSidecar = Callable[[str, str, str], Sidecar]

WEB = "outbound|80|web.demo"


def weights(sidecar: Sidecar) -> list[list[int]]:
    """The weights of every weighted route of the service `web`."""
    (host,) = sidecar.routes()[WEB]["virtual_hosts"]
    actions = [route.get("route", {}) for route in host["routes"]]
    found = [
        action["weighted_clusters"]["clusters"]
        for action in actions
        if "weighted_clusters" in action
    ]
    return [[entry.get("weight", 0) for entry in clusters] for clusters in found]


def ready(sidecar: Sidecar) -> Sidecar:
    eventually("both listeners", lambda: sidecar.listeners() == ["inbound", "outbound"])
    return sidecar


def test_envoy_receives_follows_and_keeps_its_configuration(
    serve: Serve, sidecar: StartSidecar, manifests: Path
) -> None:
    server = serve()
    client = ready(sidecar("client", "10.77.0.10", f"unix:{server.socket}"))

    # Everything arrived, and nothing warms for ever.
    assert {WEB, "outbound|80|web-v1.demo", "outbound|80|web-v2.demo"} <= set(client.clusters())
    assert client.endpoints()["outbound|80|web-v1.demo"] == ["10.77.0.11:8080"]
    assert weights(client) == [[90, 10]]
    assert "NACK" not in server.log

    # An edited file reaches Envoy, and the report says so.
    route = manifests / "route-web.yaml"
    original = route.read_text()
    edited = original.replace("weight: 90", "weight: 50").replace("weight: 10", "weight: 51")
    event = server.event_after(lambda: route.write_text(edited))
    assert event["changed"] == [f"route {WEB}"]
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (1, [], [])
    assert 0 < event["last_ack_ms"] < 10_000
    assert "changed route-web.yaml" in event["reason"]
    assert weights(client) == [[50, 51]]

    # A bad object changes nothing but the log.
    route.write_text(edited.replace("weight: 50", "weight: -1"))
    line = server.wait_for_log(r".*route-web\.yaml.*weight.*-1.*")
    server.wait_for_log(r"HTTPRoute demo/web: stays as it last was good")
    assert "HTTPRoute demo/web" in line[0]
    assert weights(client) == [[50, 51]]

    # Other objects do not wait for it; nor for a file that is no YAML.
    (manifests / "service-web-v2.yaml").write_text("{")
    service = manifests / "service-web-v1.yaml"
    service.write_text(service.read_text().replace("10.77.0.11", "10.77.0.111"))
    eventually(
        "the new endpoint",
        lambda: client.endpoints()["outbound|80|web-v1.demo"] == ["10.77.0.111:8080"],
    )
    assert weights(client) == [[50, 51]]
    assert "outbound|80|web-v2.demo" in client.clusters()

    # Repaired, it is served again.
    server.event_after(lambda: route.write_text(original))
    assert weights(client) == [[90, 10]]
    assert "NACK" not in server.log


def test_bad_objects_at_the_start_harm_only_themselves(
    serve: Serve, sidecar: StartSidecar, manifests: Path
) -> None:
    policy, late = manifests / "policy-web.yaml", manifests / "zz.yaml"
    policy.write_text(policy.read_text().replace("/admin*", "admin"))
    late.write_text("kind: [")
    server = serve()
    client = ready(sidecar("client", "10.77.0.10", f"unix:{server.socket}"))
    assert weights(client) == [[90, 10]]
    web = ready(sidecar("web-v1", "10.77.0.11", f"unix:{server.socket}"))
    (inbound,) = (route for name, route in web.routes().items() if name.startswith("inbound"))
    rules = inbound["typed_per_filter_config"]["rbac.deny"]["rbac"]["rules"]["policies"]
    assert rules["demo/web-deny-admin/0"]["permissions"] == [{"any": True}]
    assert "AuthorizationPolicy demo/web-deny-admin: cannot be read, so everything" in server.log
    assert f"{late}: line" in server.log


def test_restarted_server_sends_an_unchanged_envoy_nothing(
    serve: Serve, sidecar: StartSidecar, manifests: Path
) -> None:
    first = serve()
    client = ready(sidecar("client", "10.77.0.10", f"unix:{first.socket}"))
    assert first.stop() == 0
    assert not first.socket.exists()

    second = serve()
    for kind in ("cluster", "endpoints", "listener", "route"):
        second.wait_for_log(rf"asks {kind}: .*has ")
    route = manifests / "route-web.yaml"
    text = route.read_text().replace("weight: 90", "weight: 70")
    event = second.event_after(lambda: route.write_text(text))
    assert event["sidecars"] == 1
    assert second.sent() == [f"route: 1 ({WEB})"]
    assert weights(client) == [[70, 10]]


def test_change_of_a_cluster_does_not_leave_it_warming(
    serve: Serve, sidecar: StartSidecar, manifests: Path
) -> None:
    server = serve()
    client = ready(sidecar("client", "10.77.0.10", f"unix:{server.socket}"))
    service = manifests / "service-web-v1.yaml"
    text = service.read_text().replace("name: http", "name: grpc")
    event = server.event_after(lambda: service.write_text(text))
    assert "cluster outbound|80|web-v1.demo" in event["changed"]
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (1, [], [])
    eventually("no cluster that warms", lambda: not client.warming())
    assert client.endpoints()["outbound|80|web-v1.demo"] == ["10.77.0.11:8080"]


def test_service_comes_and_goes_with_its_route(
    serve: Serve, sidecar: StartSidecar, manifests: Path
) -> None:
    server = serve()
    client = ready(sidecar("client", "10.77.0.10", f"unix:{server.socket}"))
    spare = manifests / "spare.yaml"
    text = (manifests / "service-web-v1.yaml").read_text()
    text = text.replace("web-v1", "spare").replace("10.96.77.2", "10.96.77.99")

    server.event_after(lambda: spare.write_text(text))
    eventually("the new cluster", lambda: "outbound|80|spare.demo" in client.clusters())
    event = server.event_after(spare.unlink)
    assert event["reason"] == "removed spare.yaml"
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (1, [], [])
    assert "outbound|80|spare.demo" not in client.clusters()


def test_one_change_reaches_every_sidecar_that_it_concerns(
    serve: Serve, sidecar: StartSidecar, manifests: Path
) -> None:
    server = serve()
    xds = f"unix:{server.socket}"
    pods = {"client": "10.77.0.10", "web-v1": "10.77.0.11"}
    started = [ready(sidecar(name, ip, xds)) for name, ip in pods.items()]
    route = manifests / "route-web.yaml"
    text = route.read_text().replace("weight: 90", "weight: 1")
    event = server.event_after(lambda: route.write_text(text))
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (2, [], [])
    assert [weights(each) for each in started] == [[[1, 10]]] * 2
    server.wait_for_log(r"pushed 1 change to 2 sidecars, last ACK after \d+\.\d ms")


def test_a_policy_with_a_long_token_holds(
    serve: Serve, sidecar: StartSidecar, manifests: Path
) -> None:
    """Envoy's default refuses expressions of that size, and the policy with them."""
    server = serve()
    ready(sidecar("web-v1", "10.77.0.11", f"unix:{server.socket}"))
    policy = f"""
apiVersion: policy.redirector.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: token, namespace: demo}}
spec:
  action: DENY
  rules: [{{when: {{headers: [{{name: authorization, value: "Bearer {"x" * 200}"}}]}}}}]
"""
    event = server.event_after(lambda: (manifests / "policy-token.yaml").write_text(policy))
    assert (event["sidecars"], event["nacks"], event["waiting"]) == (1, [], [])
    assert "NACK" not in server.log


def test_an_emptied_directory_drops_no_policy(
    serve: Serve, sidecar: StartSidecar, manifests: Path
) -> None:
    server = serve()
    client = ready(sidecar("client", "10.77.0.10", f"unix:{server.socket}"))
    for path in manifests.iterdir():
        path.unlink()
    server.wait_for_log(r"no object in .*, still serving the last good state")
    assert weights(client) == [[90, 10]]
