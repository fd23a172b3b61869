"""The difference between what is asked for and what is enrolled."""

from dataclasses import replace
from pathlib import Path

from redirector.agent.reconcile import Action, Known, Target, Verb, plan
from redirector.kubernetes.desired import Refusal, Rest, Wish
from redirector.kubernetes.objects import PodObject
from redirector.model import Accelerate, Mode, Pod, Steering

POD = PodObject("shop", "web", "uid-1")
WISH = Wish(POD, Mode.EBPF, Accelerate.AUTO, Steering())
TARGET = Target(
    "uid-1", Path("/c/pod1"), Path("/proc/7/ns/net"), 7, Mode.EBPF, Accelerate.AUTO, Steering()
)
RECORD = Pod(
    name="shop/web",
    netns=Path("/proc/7/ns/net"),
    cgroup=Path("/c/pod1"),
    mode=Mode.EBPF,
    netns_cookie=7,
    uid="uid-1",
)
ASKED = Known("uid-1", WISH, TARGET)


def verbs(
    known: Known | None,
    record: Pod | None,
    *,
    populated: bool = False,
    lacks: tuple[str, ...] = (),
) -> list[Verb]:
    actions = plan(
        {} if known is None else {"shop/web": known},
        [] if record is None else [record],
        {"shop/web"} if populated else (),
        {"shop/web": lacks} if lacks else {},
    )
    return [action.verb for action in actions]


def test_what_is_as_asked_is_left_alone() -> None:
    assert verbs(ASKED, RECORD) == []
    assert verbs(None, None) == []


def test_a_new_pod_is_enrolled_once_it_is_found() -> None:
    assert verbs(ASKED, None) == [Verb.ENROLL]
    assert verbs(Known("uid-1", WISH), None) == []


def test_a_pod_that_is_gone_is_released_with_its_last_process() -> None:
    assert verbs(None, RECORD, populated=True) == []
    assert verbs(None, RECORD) == [Verb.UNENROLL]


def test_nobody_asks_any_more() -> None:
    for rest in Rest:
        assert verbs(Known("uid-1", rest), RECORD, populated=True) == [Verb.UNENROLL]


def test_another_pod_of_the_same_name() -> None:
    other = replace(ASKED, uid="uid-2")
    assert verbs(other, RECORD) == [Verb.UNENROLL, Verb.ENROLL]
    assert verbs(Known("uid-2", WISH), RECORD) == [Verb.UNENROLL]


def test_a_refused_pod_keeps_what_it_has_and_that_is_repaired() -> None:
    refused = Known("uid-1", Refusal(POD, "pod shop/web: redirector.io/mode: 'x'"))
    assert verbs(refused, RECORD) == []
    assert verbs(refused, None) == []
    assert verbs(refused, RECORD, lacks=("connect4",)) == [Verb.REPAIR]
    assert verbs(Known("uid-1", None), RECORD) == []


def test_what_is_asked_for_changes() -> None:
    for target in (
        replace(TARGET, mode=Mode.IPTABLES),
        replace(TARGET, accelerate=Accelerate.OFF),
        replace(TARGET, steering=Steering(outbound_port=15011)),
        replace(TARGET, netns=Path("/proc/8/ns/net")),
    ):
        assert verbs(replace(ASKED, target=target), RECORD) == [Verb.UPDATE]


def test_a_new_sandbox() -> None:
    for target in (replace(TARGET, netns_cookie=8), replace(TARGET, cgroup=Path("/c/pod2"))):
        assert verbs(replace(ASKED, target=target), RECORD) == [Verb.REPLACE]


def test_what_is_missing_is_repaired() -> None:
    assert verbs(ASKED, RECORD, lacks=("connect4", "sockops")) == [Verb.REPAIR]
    (action,) = plan({"shop/web": ASKED}, [RECORD], (), {"shop/web": ("connect4", "sockops")})
    assert action == Action(Verb.REPAIR, "shop/web", "lacks connect4, sockops", TARGET)


def test_what_was_enrolled_by_hand_is_nobodys_business() -> None:
    by_hand = replace(RECORD, uid="")
    assert verbs(None, by_hand) == []
    assert verbs(Known("uid-1", Rest.NOT_ASKED), by_hand, lacks=("connect4",)) == []


def test_removals_come_first() -> None:
    old = replace(RECORD, name="shop/old")
    actions = plan({"shop/web": ASKED}, [old], (), {})
    assert [(action.verb, action.name) for action in actions] == [
        (Verb.UNENROLL, "shop/old"),
        (Verb.ENROLL, "shop/web"),
    ]
