"""A bad object harms only itself: what stays in force, what is left out, where everything is
refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_ingest import ALL, POD, POLICY, ROUTE, SERVICE, SLICE
from xds_server.errors import Problem
from xds_server.following import Reader
from xds_server.ingest import Ingester
from xds_server.ir import Action, Mesh, Name, Policy, PolicyRule
from xds_server.sources.directory import Directory
from xds_server.sources.files import Manifests, parse

WEB, POD_1 = Name("demo", "web"), Name("demo", "web-1")
OTHER = SERVICE.replace("name: web", "name: other").replace("10.96.77.1", "10.96.77.2")


def step(ingester: Ingester, *texts: str) -> tuple[Mesh, list[Problem]]:
    objects, problems = parse("f.yaml", "\n---\n".join(texts))
    assert problems == []
    return ingester.ingest(objects)


def spoilt(kind: str) -> str:
    """The good object with a field that is wrong by itself."""
    data = yaml.safe_load(ALL[kind])
    match kind:
        case "Pod":
            data["spec"]["containers"][0]["ports"][0]["containerPort"] = 0
        case "EndpointSlice":
            data["ports"][0]["port"] = 0
        case "Service":
            data["spec"]["ports"][0]["port"] = 0
        case _:
            data["spec"]["surprise"] = 1
    return yaml.safe_dump(data)


def refusals(mesh: Mesh) -> dict[Name, frozenset[Name] | None]:
    """The policies that refuse everything, and for whom."""
    return {p.name: p.targets for p in mesh.policies if is_refusal(p)}


def is_refusal(policy: Policy) -> bool:
    return (policy.action, policy.rules) == (Action.DENY, (PolicyRule(),))


def essence(mesh: Mesh) -> tuple[Any, ...]:
    return (mesh.services, mesh.workloads, mesh.routes, mesh.policies)


@pytest.mark.parametrize("kind", ALL)
def test_the_last_good_form_stays_and_the_rest_goes_on(kind: str) -> None:
    ingester = Ingester()
    before, problems = step(ingester, *ALL.values())
    assert problems == []
    others = [text for name, text in ALL.items() if name != kind]
    for _ in range(2):
        mesh, problems = step(ingester, *others, spoilt(kind), OTHER)
        assert [problem.object.split()[0] for problem in problems] == [kind]
        subject = problems[0].object
        assert (mesh.kept, mesh.left_out, mesh.closed) == ((subject,), (), ())
        services = dict(mesh.services)
        assert services.pop(Name("demo", "other"))
        assert (services, *essence(mesh)[1:]) == essence(before)
    # Once it is gone it is gone, and does not come back as it was.
    step(ingester, *others)
    mesh, _ = step(ingester, *others, spoilt(kind))
    assert mesh.kept == ()


@pytest.mark.parametrize("kind", ALL)
def test_the_last_good_form_stays_when_nothing_can_be_read(kind: str) -> None:
    ingester = Ingester()
    before, _ = step(ingester, *ALL.values())
    data = yaml.safe_load(ALL[kind])
    bad = {**data, "spec": 3, "endpoints": 3, "status": 3, "ports": 3}
    others = [text for name, text in ALL.items() if name != kind]
    mesh, _ = step(ingester, *others, yaml.safe_dump(bad))
    assert len(mesh.kept) == 1
    assert essence(mesh) == essence(before)


@pytest.mark.parametrize("kind", ["Service", "EndpointSlice", "HTTPRoute"])
def test_what_never_was_good_is_left_out(kind: str) -> None:
    ingester = Ingester()
    others = [text for name, text in ALL.items() if name != kind]
    mesh, _ = step(ingester, *others, spoilt(kind))
    assert [subject.split()[0] for subject in mesh.left_out] == [kind]
    assert refusals(mesh) == {}
    assert mesh.policies[0].targets == {POD_1}
    assert (WEB in mesh.services) == (kind != "Service")
    if kind != "HTTPRoute" and WEB in mesh.services:
        assert mesh.services[WEB].ports[0].endpoints == ()
    assert bool(mesh.routes) == (kind != "HTTPRoute")


@pytest.mark.parametrize(
    ("old", "new", "targets"),
    [
        # Whom it is for can be read.
        ("/a", "a", frozenset({POD_1})),
        (
            "selector: {matchLabels: {app: web}}",
            "targetRefs: [{kind: Pod, name: web-1}]\n  x: 1",
            {POD_1},
        ),
        (
            "selector: {matchLabels: {app: web}}",
            "targetRefs: [{kind: Service, name: web}]\n  x: 1",
            {POD_1},
        ),
        # Nobody knows.
        ("matchLabels: {app: web}", "matchLabels: {app: 1}", None),
        ("matchLabels: {app: web}", "matchLabel: {app: web}", None),
        ("selector:", "selectr:", None),
        (
            "selector: {matchLabels: {app: web}}",
            "targetRefs: [{kind: Deployment, name: web}]",
            None,
        ),
        ("spec:", "spec: 3\nspecs:", None),
        # Not even what it is.
        ("kind: AuthorizationPolicy", "kind: AuthorisationPolicy", frozenset({POD_1})),
        ("policy.redirector.io/v1alpha1", "policy.redirector.io/v1", frozenset({POD_1})),
    ],
)
def test_a_policy_that_never_was_good_refuses_everything(
    old: str, new: str, targets: frozenset[Name] | None
) -> None:
    assert old in POLICY
    ingester = Ingester()
    second = POD.replace("web", "db").replace("10.77.0.1", "10.77.0.2")
    mesh, _ = step(ingester, SERVICE, POD, second, SLICE, POLICY.replace(old, new))
    assert refusals(mesh) == {WEB: targets}
    assert len(mesh.closed) == 1
    assert mesh.left_out == ()
    # Corrected it is what it says.
    mesh, problems = step(ingester, SERVICE, POD, second, SLICE, POLICY)
    assert (problems, refusals(mesh), len(mesh.policies)) == ([], {}, 1)
    # From then on that stays.
    mesh, _ = step(ingester, SERVICE, POD, second, SLICE, POLICY.replace(old, new))
    assert (refusals(mesh), mesh.policies[0].targets) == ({}, {POD_1})


def test_a_policy_that_lost_its_name_stays_as_it_was() -> None:
    ingester = Ingester()
    nameless = POLICY.replace("name: web, ", "")
    mesh, _ = step(ingester, POD, nameless)
    assert refusals(mesh) == {Name("demo", "(unreadable)"): None}
    step(ingester, POD, POLICY)
    mesh, _ = step(ingester, POD, nameless)
    assert WEB in {policy.name for policy in mesh.policies}


def test_a_list_of_policies_as_the_api_server_has_it_is_not_read_but_not_open() -> None:
    policy = yaml.safe_load(POLICY)
    found = {
        "apiVersion": policy["apiVersion"],
        "kind": "AuthorizationPolicyList",
        "items": [{"metadata": policy["metadata"], "spec": policy["spec"]}, 7],
    }
    mesh, problems = step(Ingester(), POD, yaml.safe_dump(found))
    assert problems
    assert set(refusals(mesh)) == {Name("demo", "(unreadable)"), Name("default", "(unreadable)")}


def test_a_policy_for_what_cannot_be_read() -> None:
    """A pod whose labels are unreadable may be meant by any policy of its namespace, and so may any
    pod by a policy for a service whose selector is unreadable."""
    odd = POD.replace("{app: web}", "{app: 1}")
    mesh, _ = step(Ingester(), odd, POLICY)
    assert list(refusals(mesh).values()) == [frozenset({POD_1})]
    mesh, _ = step(Ingester(), odd, POLICY.replace("demo", "far"))
    assert refusals(mesh) == {}
    service = SERVICE.replace("clusterIP", "selector: 7, clusterIP")
    policy = POLICY.replace(
        "selector: {matchLabels: {app: web}}", "targetRefs: [{kind: Service, name: web}]"
    )
    mesh, _ = step(Ingester(), service, POD, policy)
    assert refusals(mesh) == {WEB: None}
    # Without a good selector its slices would do, but they may not be all.
    mesh, _ = step(Ingester(), service, POD, policy, SLICE)
    assert refusals(mesh) == {WEB: None}


@pytest.mark.parametrize("shape", ["good", "bad", "never good"])
def test_a_policy_holds_while_the_service_that_it_is_for_is_gone(shape: str) -> None:
    policy = POLICY.replace(
        "selector: {matchLabels: {app: web}}", "targetRefs: [{kind: Service, name: web}]"
    )
    service = SERVICE.replace("clusterIP", "selector: {app: web}, clusterIP")
    spoiled = policy.replace("/a", "a")
    ingester = Ingester()
    step(ingester, service, POD, spoiled if shape == "never good" else policy)
    now = policy if shape == "good" else spoiled
    # Pods that are new since then are governed, too.
    second = POD.replace("web-1", "web-2").replace("10.77.0.1", "10.77.0.2")
    for _ in range(2):
        mesh, _ = step(ingester, POD, second, now)
        assert mesh.policies[0].targets == {POD_1, Name("demo", "web-2")}
        assert bool(refusals(mesh)) == (shape == "never good")
        assert mesh.services == {}
        assert [port.number for port in mesh.workloads[POD_1].ports] == [8080]
    # A service of that name that selects others is another one.
    mesh, _ = step(ingester, service.replace("app: web", "app: db"), POD, policy)
    assert mesh.policies[0].targets == frozenset()
    # Nothing is known any more once no policy asks for it.
    step(ingester, POD)
    mesh, _ = step(ingester, POD, policy)
    assert mesh.policies[0].targets == frozenset()


def test_a_bad_pod_is_still_governed_and_trusted_by_nobody() -> None:
    allow = POLICY.replace("to: [{paths: [/a]}]", "to: [{ports: [80]}]")
    deny = allow.replace("name: web, ", "name: deny, ").replace("spec:", "spec:\n  action: DENY")
    mesh, _ = step(Ingester(), spoilt("Pod"), allow, deny)
    by_name = {policy.name.name: policy for policy in mesh.policies}
    assert by_name["web"].targets == {POD_1}
    assert by_name["web"].rules[0].sources[0].groups == ((),)
    (denied,) = by_name["deny"].rules[0].sources[0].groups
    assert [str(network) for network in denied] == ["10.77.0.1/32", "fe80::/10"]
    assert mesh.workloads[POD_1].ports == ()


def test_references_that_lead_nowhere_keep_the_rest() -> None:
    """What an object lacks of others is no fault of its own: it is not kept as it was."""
    ingester = Ingester()
    two = ROUTE.replace(
        "rules: [{backendRefs: [", "rules: [{backendRefs: [{name: other, port: 80}, "
    )
    step(ingester, SERVICE, OTHER, two)
    mesh, problems = step(ingester, SERVICE, two)
    assert ["there is no Service demo/other" in str(problem) for problem in problems] == [True]
    assert (mesh.kept, mesh.left_out) == ((), ())
    assert [backend.found for backend in mesh.routes[0].rules[0].backends] == [False, True]
    mesh, problems = step(
        ingester,
        POD,
        POLICY.replace(
            "selector: {matchLabels: {app: web}}",
            "targetRefs: [{kind: Pod, name: web-1}, {kind: Pod, name: gone}]",
        ),
    )
    assert (len(problems), mesh.closed, mesh.policies[0].targets) == (1, (), {POD_1})


@pytest.mark.parametrize("swap", [False, True])
def test_the_older_one_keeps_name_and_address(swap: bool) -> None:
    def made(text: str, when: str) -> str:
        return text.replace("metadata: {", f'metadata: {{creationTimestamp: "{when}", ')

    old, new = made(SERVICE, "2026-01-01T00:00:00Z"), made(SERVICE, "2026-02-01T00:00:00Z")
    new = new.replace("10.96.77.1", "10.96.77.9")
    mesh, problems = step(Ingester(), *([new, old] if swap else [old, new]))
    assert [str(a) for a in mesh.services[WEB].addresses] == ["10.96.77.1"]
    assert len(problems) == 1

    other = made(SERVICE.replace("name: web", "name: a-other"), "2026-02-01T00:00:00Z")
    mesh, problems = step(Ingester(), *([other, old] if swap else [old, other]))
    assert [str(a) for a in mesh.services[WEB].addresses] == ["10.96.77.1"]
    assert mesh.services[Name("demo", "a-other")].addresses == ()
    assert [problem.object for problem in problems] == ["Service demo/a-other"]


def test_an_address_that_two_pods_claim_allows_nobody() -> None:
    twin = POD.replace("web-1", "web-2")
    mesh, problems = step(Ingester(), POD, twin, POLICY)
    assert len(problems) == 1
    assert mesh.policies[0].rules[0].sources[0].groups == ((),)
    assert mesh.policies[0].targets == {POD_1, Name("demo", "web-2")}


def test_a_nodes_address_that_a_pod_claims_allows_nobody() -> None:
    node = POD.replace("web-1", "node").replace("spec: {", "spec: {hostNetwork: true, ")
    for texts in ([POD, node], [node, POD]):
        mesh, _ = step(Ingester(), *texts, POLICY)
        assert mesh.policies[0].rules[0].sources[0].groups == ((),)


@pytest.mark.parametrize("said", ["serviceAccountName: robot", "serviceAccount: robot", ""])
def test_accounts_are_those_that_an_api_server_would_fill_in(said: str) -> None:
    pod = POD.replace("spec: {", f"spec: {{{said or 'serviceAccountName: ' + repr('')}, ")
    policy = POLICY.replace("namespaces: [demo]", "serviceAccounts: [robot]")
    mesh, _ = step(Ingester(), pod, policy)
    assert mesh.workloads[POD_1].service_account == ("robot" if said else "default")
    assert bool(mesh.policies[0].rules[0].sources[0].groups[0]) == bool(said)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text("\n---\n".join([SERVICE, ROUTE]))
    (tmp_path / "b.yaml").write_text("\n---\n".join([POD, POLICY]))
    return tmp_path


def count(manifests: Manifests) -> tuple[int, int, frozenset[str]]:
    objects, problems = manifests.load()
    return len(objects), len(problems), suspected(problems)


def suspected(problems: list[Problem]) -> frozenset[str]:
    return frozenset().union(*(problem.suspects for problem in problems))


@pytest.mark.parametrize("bad", [b"a: [", b"\xff", b"- 1", b"kind: List\nitems: 1\n"])
def test_a_file_that_cannot_be_read_stays_as_it_was(directory: Path, bad: bytes) -> None:
    manifests = Manifests(directory)
    assert count(manifests) == (4, 0, frozenset())
    good = (directory / "b.yaml").read_bytes()
    (directory / "c.yaml").write_text(OTHER)
    # Also one that is half written.
    for content in (bad, good[:-9]):
        (directory / "b.yaml").write_bytes(content)
        assert count(manifests) == (5, 1, frozenset())
    (directory / "b.yaml").write_bytes(good)
    assert count(manifests) == (5, 0, frozenset())
    (directory / "b.yaml").unlink()
    assert count(manifests) == (3, 0, frozenset())


def test_a_file_that_was_emptied_is_about_to_be_written(directory: Path) -> None:
    """As with `kubectl get ... > FILE`, which may take a while."""
    manifests = Manifests(directory)
    (directory / "c.yaml").write_text("")
    assert count(manifests) == (4, 0, frozenset())
    (directory / "b.yaml").write_text("")
    assert count(manifests) == (4, 1, frozenset())
    (directory / "b.yaml").write_text("# nothing\n")
    assert count(manifests) == (2, 0, frozenset())


async def test_last_good_forms_outlive_an_empty_directory(directory: Path) -> None:
    reader = Reader(Directory(directory))
    before = await reader.read()
    assert (before.objects, before.problems) == (4, [])
    texts = {path: path.read_text() for path in directory.iterdir()}
    for path in texts:
        path.unlink()
    assert (await reader.read()).objects == 0
    for path, text in texts.items():
        path.write_text(text.replace("paths: [/a]", "paths: [a]"))
    found = await reader.read()
    assert found.mesh.kept == ("AuthorizationPolicy demo/web",)
    assert essence(found.mesh) == essence(before.mesh)


def test_of_a_file_that_never_could_be_read_its_good_documents_are(directory: Path) -> None:
    """A policy in the others may be for the namespaces that are named there."""
    (directory / "b.yaml").write_text("\n--- # next\n".join([POD, POLICY[:-9], OTHER, "a: [", POD]))
    assert count(Manifests(directory)) == (5, 1, frozenset({"demo"}))
    (directory / "b.yaml").write_text("kind: AuthorizationPolicy\na: [")
    assert count(Manifests(directory)) == (2, 1, frozenset({"default"}))
    (directory / "b.yaml").write_bytes(POLICY.encode() + b"\xff")
    assert count(Manifests(directory)) == (2, 1, frozenset({"demo"}))
    objects, problems = Manifests(directory).load()
    mesh, _ = Ingester().ingest(objects, suspected(problems))
    assert refusals(mesh) == {Name("demo", "(unreadable)"): None}
    assert mesh.closed == ("Namespace demo",)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(1 << 40)
    _, (problem,) = Manifests(tmp_path).load()
    assert "is larger than 32 MiB; split it" in str(problem)
