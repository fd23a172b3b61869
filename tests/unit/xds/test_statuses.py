"""What is written to an object's status: ours as it is wanted, everybody else's untouched."""

import copy
from typing import Any

from xds_server.conditions import Condition, ObjectStatus, ParentStatus, Reference
from xds_server.ir import Mesh, Name, NodeId, Parent, Route
from xds_server.quarantine import Quarantined
from xds_server.references import ROUTE
from xds_server.statuses import CONTROLLER, Refusal, Replica, lines, patch, with_programmed
from xds_server.telling import Telling
from xds_server.translate.clusters import cluster_name

THEN, NOW = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
WEB = Reference("", "Service", None, "web")
OTHER = Reference("", "Service", "far", "other", port=80)
ACCEPTED = Condition("Accepted", True, "Accepted")
REFUSED = Condition("Accepted", False, "NoMatchingParent", "there is no Service demo/web")
THEIRS: dict[str, Any] = {
    "parentRef": {"name": "gateway"},
    "controllerName": "example.com/gateway",
    "conditions": [{"type": "Accepted", "status": "True", "lastTransitionTime": THEN}],
}


def replica(name: str = "a", *living: str) -> Replica:
    return Replica(name, lambda other: other in living)


def route(*parents: ParentStatus, generation: int | None = 3) -> ObjectStatus:
    version = "gateway.networking.k8s.io/v1"
    return ObjectStatus(version, "HTTPRoute", "demo", "web", generation, parents=parents)


def policy(*conditions: Condition, targets: tuple[ParentStatus, ...] = ()) -> ObjectStatus:
    version = "policy.redirector.io/v1alpha1"
    return ObjectStatus(version, "AuthorizationPolicy", "demo", "web", 1, conditions, targets)


def written(
    before: dict[str, Any], want: ObjectStatus | None, now: str = THEN, who: Replica | None = None
) -> dict[str, Any]:
    """The status after what was to be merged into it."""
    return {**copy.deepcopy(before), **patch(before, want, now, who or replica())}


def test_a_route_is_told_of_for_each_parent() -> None:
    want = route(ParentStatus(WEB, (ACCEPTED,)), ParentStatus(OTHER, (REFUSED,)))
    assert written({}, want)["parents"] == [
        {
            "parentRef": {"group": "", "kind": "Service", "name": "web"},
            "controllerName": CONTROLLER,
            "conditions": [
                {
                    "type": "Accepted",
                    "status": "True",
                    "reason": "Accepted",
                    "message": "",
                    "lastTransitionTime": THEN,
                    "observedGeneration": 3,
                }
            ],
        },
        {
            "parentRef": {
                "group": "",
                "kind": "Service",
                "namespace": "far",
                "name": "other",
                "port": 80,
            },
            "controllerName": CONTROLLER,
            "conditions": [
                {
                    "type": "Accepted",
                    "status": "False",
                    "reason": "NoMatchingParent",
                    "message": "there is no Service demo/web",
                    "lastTransitionTime": THEN,
                    "observedGeneration": 3,
                }
            ],
        },
    ]


def test_what_stands_there_already_is_not_written() -> None:
    want = route(ParentStatus(WEB, (ACCEPTED,)))
    assert patch(written({"parents": [THEIRS]}, want), want, NOW, replica()) == {}


def test_the_time_is_that_of_the_last_change_of_status() -> None:
    before = written({}, route(ParentStatus(WEB, (ACCEPTED,))))
    newer = route(ParentStatus(WEB, (ACCEPTED,)), generation=4)
    (entry,) = written(before, newer, NOW)["parents"][0]["conditions"]
    assert (entry["lastTransitionTime"], entry["observedGeneration"]) == (THEN, 4)
    (entry,) = written(before, route(ParentStatus(WEB, (REFUSED,))), NOW)["parents"][0][
        "conditions"
    ]
    assert entry["lastTransitionTime"] == NOW


def test_entries_of_others_stay_as_they_are() -> None:
    want = route(ParentStatus(WEB, (ACCEPTED,)))
    after = written({"parents": [THEIRS]}, want)
    assert after["parents"][0] == THEIRS
    assert len(after["parents"]) == 2
    # A parent that is no longer referred to goes, and all of ours when the route is not ours.
    moved = written(after, route(ParentStatus(OTHER, (ACCEPTED,))), NOW)
    assert [entry["parentRef"]["name"] for entry in moved["parents"]] == ["gateway", "other"]
    assert written(moved, None, NOW)["parents"] == [THEIRS]
    assert patch({"parents": [THEIRS]}, None, NOW, replica()) == {}
    assert patch({}, None, NOW, replica()) == {}


def test_a_policys_targets_are_its_ancestors() -> None:
    want = policy(targets=(ParentStatus(WEB, (ACCEPTED,)),))
    after = written({}, want)
    assert list(after) == ["ancestors"]
    assert after["ancestors"][0]["ancestorRef"]["name"] == "web"
    assert patch(after, want, NOW, replica()) == {}


def test_conditions_of_others_stay_as_they_are() -> None:
    theirs = {"type": "Liked", "status": "True"}
    after = written({"conditions": [theirs]}, policy(ACCEPTED))
    assert after["conditions"][0] == theirs
    assert [entry["type"] for entry in after["conditions"]] == ["Liked", "Accepted"]
    assert patch(after, policy(ACCEPTED), NOW, replica()) == {}
    aimed = written(after, policy(targets=(ParentStatus(WEB, (ACCEPTED,)),)))
    assert aimed["conditions"] == [theirs]
    assert len(aimed["ancestors"]) == 1


def test_nonsense_in_a_status_is_replaced_where_it_is_ours() -> None:
    for nonsense in ({"parents": 3}, {"parents": [7]}, {"parents": None}):
        after = written(nonsense, route(ParentStatus(WEB, (ACCEPTED,))))
        assert len(after["parents"]) == 1


def programmed(status: ObjectStatus) -> list[tuple[bool, str]]:
    return [
        (c.status, c.message)
        for parent in status.parents
        for c in parent.conditions
        if c.type == "Programmed"
    ]


def test_envoys_own_words_stand_at_the_parent_that_they_concern() -> None:
    status = route(ParentStatus(WEB, (ACCEPTED,)), ParentStatus(OTHER, (ACCEPTED,)))
    refusals = [
        Refusal("web-v2.demo", "no such filter", Name("demo", "web")),
        Refusal("web-v1.demo", "bad\nregex", Name("demo", "web")),
    ]
    words = "refused by web-v1.demo and 1 more: bad regex (told by a)"
    assert programmed(with_programmed(status, refusals, "a")) == [(False, words), (True, "")]
    assert programmed(with_programmed(status, [], "a")) == [(True, ""), (True, "")]
    long = with_programmed(status, [Refusal("x", "y" * 9000)], "a")
    assert [len(text) for _, text in programmed(long)] == [1024, 1024]
    assert programmed(long)[0][1].endswith("yy (told by a)")
    assert programmed(with_programmed(route(ParentStatus(WEB, (REFUSED,))), refusals, "a")) == []


def test_what_another_servers_sidecars_refuse_is_its_own_to_take_back() -> None:
    status = route(ParentStatus(WEB, (ACCEPTED,)))
    refused = with_programmed(status, [Refusal("web-v1.demo", "bad")], "b")
    well = with_programmed(status, [], "a")
    before = written({}, refused, THEN, replica("b", "a", "b"))
    assert patch(before, well, NOW, replica("a", "a", "b")) == {}
    assert patch(before, refused, NOW, replica("b", "a", "b")) == {}
    # It is gone; it has changed its mind; the route has changed since.
    newer = with_programmed(route(ParentStatus(WEB, (ACCEPTED,)), generation=4), [], "a")
    for want, who in (
        (well, replica("a", "a")),
        (well, replica("b", "a", "b")),
        (newer, replica("a", "a", "b")),
    ):
        after = written(before, want, NOW, who)
        assert after["parents"][0]["conditions"][1]["status"] == "True"


def test_the_log_has_a_line_for_each_change() -> None:
    partly = Condition("PartiallyInvalid", True, "UnsupportedValue", "a rule is dropped")
    well = route(ParentStatus(WEB, (ACCEPTED,)))
    bad = route(ParentStatus(WEB, (REFUSED, partly)))
    where = "HTTPRoute demo/web for Service demo/web"
    assert lines([], [well]) == []
    assert lines([well], [well]) == []
    assert lines([well], [bad]) == [
        (False, f"{where}: Accepted is False, NoMatchingParent: there is no Service demo/web"),
        (False, f"{where}: PartiallyInvalid is True, UnsupportedValue: a rule is dropped"),
    ]
    assert lines([bad], [well]) == [
        (True, f"{where}: Accepted is True, Accepted"),
        (True, f"{where}: no longer PartiallyInvalid"),
    ]
    assert lines([], [policy(REFUSED)])[0][1].startswith(
        "AuthorizationPolicy demo/web: Accepted is False"
    )


def test_what_sidecars_refuse_is_told_of_its_objects_where_nobody_writes_statuses() -> None:
    web = Name("demo", "web")
    of_web = ParentStatus(Reference("", "Service", None, "web", port=80), (ACCEPTED,))
    telling = Telling()
    mesh = Mesh(
        routes=(Route(web, "", (Parent(web, 80),), (), ()),), statuses=(route(of_web), policy())
    )
    telling.tell(mesh)

    def programmed(*refused: Quarantined) -> Condition:
        node = NodeId("10.0.0.1", "client", "demo")
        of_route, of_policy = telling.outcomes((node, each) for each in refused)
        assert of_policy == policy()
        return of_route.parents[0].conditions[-1]

    assert programmed() == Condition("Programmed", True, "Programmed")
    found = programmed(Quarantined(ROUTE, cluster_name(web, 80), "1", "no such\nthing"))
    text = "refused by client.demo: no such thing"
    assert found == Condition("Programmed", False, "Invalid", text)
