"""Steps 5 and 6: what changes while a client keeps sending."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redirector import machine, network
from redirector.datapath.layout import Counter
from redirector.demo import route
from redirector.demo.client import Answer, Request
from redirector.demo.console import Console
from redirector.demo.show import check_split
from redirector.demo.traffic import Traffic
from redirector.demo.world import (
    ADDRESSES,
    APP_PORT,
    CLIENT,
    ENROLLED,
    PLAIN,
    SERVICE,
    SERVICE_V1,
    WEB_V1,
    WEB_V2,
    World,
)
from redirector.model import Mode
from redirector.modes.iptables.tables import OUTPUT_CHAIN

_NEW_WEIGHTS = {WEB_V1: 20, WEB_V2: 80}
_BEFORE, _AFTER = 400, 600
_KEPT, _FRESH, _PAUSE_S = 4, 4, 0.01
#: Requests that have to pass before the next pod is changed, and in a mode before it is left.
_BETWEEN, _DWELL = 60, 300
#: Differs from one answer to the next by design.
_VOLATILE = frozenset({"x-request-id", "x-envoy-expected-rq-timeout-ms"})

_TESTER = {"x-user": "tester"}


@dataclass(frozen=True)
class Question:
    """A request whose answer must not depend on the mode; `spread`: either web pod may answer."""

    pod: str
    request: Request
    spread: bool = False


QUESTIONS = (
    Question(CLIENT, Request(SERVICE), spread=True),
    Question(CLIENT, Request(SERVICE, path="/a/page?x=1"), spread=True),
    Question(CLIENT, Request(SERVICE, headers=_TESTER)),
    Question(CLIENT, Request(SERVICE, path="/admin")),
    Question(CLIENT, Request(SERVICE, method="POST")),
    Question(CLIENT, Request(SERVICE_V1)),
    Question(CLIENT, Request(ADDRESSES[WEB_V1], APP_PORT)),
    Question(CLIENT, Request(SERVICE, port=81)),
    Question(PLAIN, Request(ADDRESSES[WEB_V1], APP_PORT)),
    Question(PLAIN, Request(ADDRESSES[WEB_V1], APP_PORT, path="/admin")),
    Question(PLAIN, Request(SERVICE)),
)


def reweigh(world: World, console: Console) -> None:
    """New weights in the HTTPRoute; traffic follows."""
    path = world.manifests / route.FILE
    with world.traffic(kept=_KEPT, fresh=_FRESH, pause=_PAUSE_S) as traffic:
        console.waiting(f"sending {_BEFORE} requests")
        before = traffic.wait_for(_BEFORE)
        console.say(f"{_KEPT + _FRESH} requests at a time, half of them on kept connections:")
        console.bars(before.split())
        check_split(console, before, route.weights(path))
        pushes = len(_events(world.events))
        weights = ", ".join(f"{name}: {weight}" for name, weight in _NEW_WEIGHTS.items())
        console.say()
        console.say(f"Now {path.name} is edited: {weights}")
        route.reweigh(path, _NEW_WEIGHTS)
        console.waiting("waiting for the sidecars' ACKs")
        world.wait(lambda: len(_events(world.events)) > pushes, "the push of the new weights")
        acked = time.monotonic()
        push = _events(world.events)[pushes]
        _check_push(console, push)
        console.say()
        console.waiting(f"sending {_AFTER} requests")
        after = traffic.wait_for(_AFTER, since=acked)
        console.bars(after.split())
        check_split(console, after, route.weights(path))
        traffic.stop()
        _check_traffic(console, traffic)


def _check_push(console: Console, push: dict[str, Any]) -> None:
    answered = not push["nacks"] and not push["waiting"] and push["sidecars"] == len(ENROLLED)
    console.check(
        answered,
        "every sidecar has acknowledged the change",
        "; ".join([f"{push['sidecars']} sidecars", *push["nacks"], *push["waiting"]]),
    )
    took = push["last_ack_ms"]
    console.check(
        took is not None,
        "from the file's change to the last sidecar's ACK:",
        f"{took or 0:.1f} ms",
    )
    changed = push["changed"]
    console.check(len(changed) == 1, "only what changed was sent", ", ".join(changed))


def _check_traffic(console: Console, traffic: Traffic) -> None:
    tally = traffic.all()
    console.check(
        not tally.failures,
        "no request failed",
        f"{len(tally.failures)} of {len(tally.outcomes)}  {tally.why()}".rstrip(),
    )
    console.check(
        tally.kept_open() == _KEPT,
        "the kept connections stayed open all the time",
        f"{tally.kept_open()} of {_KEPT}, {tally.kept} requests on them",
    )


def _events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def change_modes(world: World, console: Console) -> None:
    """eBPF, iptables, eBPF, under traffic; the same questions are asked in each."""
    given: list[list[Answer]] = []
    rows: list[tuple[object, ...]] = []
    with world.traffic(kept=_KEPT, fresh=_FRESH, pause=_PAUSE_S) as traffic:
        console.waiting("a client keeps sending")
        traffic.wait_for(_DWELL)
        given.append(_answers(world))
        for mode in (Mode.IPTABLES, Mode.EBPF):
            rows.append(_change(world, console, traffic, mode))
            given.append(_answers(world))
        traffic.stop()
        console.table(
            ("three pods, one after the other", "requests meanwhile", "failed", "took"), rows
        )
        _check_traffic(console, traffic)
    _compare(console, given)


def _change(world: World, console: Console, traffic: Traffic, mode: Mode) -> tuple[object, ...]:
    began = time.monotonic()
    console.quiet(f"$ redirector mode {ENROLLED[0]} {mode}")
    for name in ENROLLED:
        console.waiting(f"changing {name} to {mode} mode")
        world.enrollment.change_mode(name, mode)
        traffic.wait_for(_BETWEEN)
    took = time.monotonic() - began
    console.waiting(f"sending in {mode} mode")
    traffic.wait_for(_DWELL)
    found = world.enrollment.status()
    console.check(
        all(status.pod.mode is mode and not status.missing for status in found),
        f"all pods are in {mode} mode, whole",
        ", ".join(what for status in found for what in status.missing),
    )
    _check_steering(world, console, mode)
    tally = traffic.sent_since(began)
    return f"to {mode}", len(tally.outcomes), len(tally.failures), f"{took:.1f} s"


def _check_steering(world: World, console: Console, mode: Mode) -> None:
    """Whether this mode, and no other, is what brings connections to the client's sidecar."""
    rules, programs = _steered_by_rules(world), _steered_by_programs(world)
    world.ask(CLIENT, [Request(SERVICE)] * 5)
    rules, programs = _steered_by_rules(world) - rules, _steered_by_programs(world) - programs
    seen = f"meanwhile by iptables rules: {rules}, by eBPF programs: {programs}"
    steered, idle = (rules, programs) if mode is Mode.IPTABLES else (programs, rules)
    console.check(steered >= 5 and not idle, f"new connections are steered by {mode}", seen)


def _steered_by_programs(world: World) -> int:
    found = {status.pod.name: status.counters for status in world.enrollment.status()}
    return found[CLIENT].get(Counter.STEERED_OUTBOUND, 0)


def _steered_by_rules(world: World) -> int:
    """Connections that a rule of ours has redirected to the client's sidecar."""
    return sum(
        int(line[1 : line.index(":")])
        for line in nat_rules(world, CLIENT)
        if f"-A {OUTPUT_CHAIN} " in line and "-j REDIRECT" in line
    )


def nat_rules(world: World, pod: str) -> list[str]:
    """The IPv4 and IPv6 NAT rules in a pod's namespace, as `[packets:bytes] -A CHAIN ...`."""
    found: list[str] = []
    for program in ("iptables-save", "ip6tables-save"):
        path = machine.find_tool(program, "iptables")
        done = network.run_in(world.pods[pod].netns, [str(path), "-c", "-t", "nat"])
        found += [line for line in done.stdout.splitlines() if line.startswith("[")]
    return found


def _answers(world: World) -> list[Answer]:
    answers: dict[int, Answer] = {}
    for pod in (CLIENT, PLAIN):
        asked = [n for n, question in enumerate(QUESTIONS) if question.pod == pod]
        got = world.ask(pod, [QUESTIONS[n].request for n in asked])
        answers.update(zip(asked, got, strict=True))
    return [answers[n] for n in range(len(QUESTIONS))]


def _compare(console: Console, given: Sequence[list[Answer]]) -> None:
    console.say()
    console.say("The same requests, asked in each mode:")
    console.table(
        ("from", "request", Mode.EBPF, Mode.IPTABLES, f"{Mode.EBPF} again"),
        [
            (question.pod, question.request, *(_brief(answers[n], question) for answers in given))
            for n, question in enumerate(QUESTIONS)
        ],
    )
    differ = [
        str(question.request)
        for n, question in enumerate(QUESTIONS)
        if any(_essence(a[n], question) != _essence(given[0][n], question) for a in given)
    ]
    console.check(
        not differ,
        "same status, application, addresses and headers in both modes",
        "; ".join(differ) or f"{len(QUESTIONS)} requests",
    )


def _brief(answer: Answer, question: Question) -> str:
    if answer.error:
        return "no answer"
    return f"{answer.status} {'web-v1 or -v2' if question.spread and answer.name else answer.name}"


def _essence(answer: Answer, question: Question) -> tuple[object, ...]:
    """What of an answer must be the same in every mode."""
    saw = {key: value for key, value in answer.saw.items() if key != "headers"}
    if question.spread:
        saw.pop("name", None)
    headers = {k: v for k, v in answer.saw.get("headers", {}).items() if k not in _VOLATILE}
    route = answer.headers.get("x-route")
    failed = bool(answer.error)
    return answer.status, route, answer.text, answer.peer, failed, sorted(saw.items()), headers
