"""Step 4: real HTTP through it, and what happened to it."""

import math
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from redirector.datapath.layout import Counter, Side
from redirector.datapath.maps import OpenFlow
from redirector.demo import route
from redirector.demo.app import Seen
from redirector.demo.client import Answer, Request
from redirector.demo.console import Console
from redirector.demo.traffic import Tally
from redirector.demo.world import (
    ADDRESSES,
    APP_PORT,
    CLIENT,
    ENROLLED,
    PLAIN,
    SERVICE,
    WEB_V1,
    WEB_V2,
    WEBS,
    World,
)

_TESTER = {"x-user": "tester"}
#: Of the answer's; the request's are all shown.
_SHOWN_HEADERS = frozenset({"content-type", "server", "x-route"})
_SPLIT_REQUESTS = 600
_KEPT, _FRESH, _PAUSE_S = 4, 2, 0.003

_SHOWN: dict[Counter, str] = {
    Counter.STEERED_OUTBOUND: "connections steered to the sidecar, outbound",
    Counter.STEERED_INBOUND: "connections steered to the sidecar, inbound",
    Counter.ACCELERATED: "sockets accelerated",
    Counter.REDIRECTED_MESSAGES: "messages moved from socket to socket",
    Counter.REDIRECTED_BYTES: "bytes moved from socket to socket",
}
_PASSED = (
    Counter.PASSED_NO_PEER,
    Counter.PASSED_UNREAD,
    Counter.PASSED_FAST_OPEN,
    Counter.PASSED_FULL,
)
#: REFUSED_NO_FLOW is not of them: it also counts a last segment that comes when its connection is
#: gone already, and a connection that it refused would be a failed request here.
_REFUSED = (Counter.REFUSED_NO_STATE, Counter.REFUSED_NO_LISTENER)


def show(world: World, console: Console) -> None:
    """Requests, one kind after the other, then the datapath's own account of them."""
    opened = _one_request(world, console)
    opened += _header_match(world, console)
    opened += _denied(world, console)
    _from_outside(world, console)
    opened += _split(world, console)
    _counters(world, console, opened)


def _one_request(world: World, console: Console) -> int:
    request = Request(SERVICE)
    (answer,) = world.ask(CLIENT, [request])
    console.say(f"{CLIENT}: {request}")
    saw, headers = answer.saw, _headers(answer)
    ours = [
        ("answered by", answer.name),
        ("status", answer.status),
        ("connected to", answer.peer),
        *((name, value) for name, value in answer.headers.items() if name in _SHOWN_HEADERS),
    ]
    theirs = [("TCP peer (its sidecar)", saw.get("client", "-")), *headers.items()]
    pairs = zip_longest(ours, theirs, fillvalue=("", ""))
    console.table(
        ("what the client sees", "", f"what {answer.name or 'the application'} sees", ""),
        [(*left, *right) for left, right in pairs],
    )
    console.check(answer.status == 200 and answer.name in WEBS, "answered", answer.error)
    console.check(
        answer.peer == f"{SERVICE}:80",
        "the client believes to be connected to the service, not to its sidecar",
        answer.peer,
    )
    console.check(
        headers.get("x-forwarded-for") == ADDRESSES[CLIENT],
        "the application learns the client pod's address",
        headers.get("x-forwarded-for"),
    )
    changed = (answer.headers.get("x-route"), headers.get("x-routed-by"))
    console.check(
        changed == ("split", "redirector"),
        "the route's filters added a header to each direction",
    )
    return 1


def _header_match(world: World, console: Console) -> int:
    number = 20
    answers = world.ask(CLIENT, [Request(SERVICE, headers=_TESTER)] * number)
    to_v2 = sum(answer.name == WEB_V2 for answer in answers)
    console.say()
    console.say(f"{CLIENT}: {Request(SERVICE, headers=_TESTER)}")
    console.check(to_v2 == number, "header match: testers reach web-v2", f"{to_v2} of {number}")
    return number


def _denied(world: World, console: Console) -> int:
    before = _all_seen(world)
    requests = [
        Request(SERVICE, path="/admin"),
        Request(SERVICE, path="/x/..//admin/users"),
        Request(SERVICE, method="POST"),
        Request(SERVICE, headers=_TESTER, path="/admin"),
    ]
    answers = world.ask(CLIENT, requests)
    after = _all_seen(world)
    console.say()
    console.table(
        ("denied by policy", "status", "words of"),
        _rows(requests, answers),
    )
    console.check(
        all(answer.status == 403 for answer in answers),
        "403, from the sidecar of the pod that was asked",
        answers[0].text,
    )
    console.check(
        after == before,
        "no application has seen any of them",
        f"{len(before)} requests seen before, {len(after)} after",
    )
    return len(requests)


def _rows(requests: list[Request], answers: list[Answer]) -> list[tuple[object, ...]]:
    pairs = zip(requests, answers, strict=True)
    return [(request, answer.status or "-", _who(answer)) for request, answer in pairs]


def _who(answer: Answer) -> str:
    if answer.error:
        return answer.error
    return f"the application {answer.name}" if answer.name else f"Envoy: {answer.text}"


def _from_outside(world: World, console: Console) -> None:
    to_pod = Request(ADDRESSES[WEB_V1], APP_PORT)
    posted = Request(ADDRESSES[WEB_V1], APP_PORT, method="POST")
    requests = [Request(SERVICE), to_pod, posted]
    service, pod, denied = world.ask(PLAIN, requests)
    console.table(
        (f"from {PLAIN}, which is not enrolled", "status", "words of"),
        _rows(requests, [service, pod, denied]),
    )
    console.check(bool(service.error), "not steered: the service's address leads nowhere")
    console.check(
        _headers(pod).get("x-forwarded-for") == ADDRESSES[PLAIN],
        "but what it sends to an enrolled pod passes that pod's sidecar",
        f"x-forwarded-for {_headers(pod).get('x-forwarded-for')}",
    )
    console.check(denied.status == 403, "which applies its policy", f"POST: {denied.status}")


def _split(world: World, console: Console) -> int:
    console.say()
    console.say(f"{CLIENT}: {Request(SERVICE)}, {_KEPT} connections kept, others new each time")
    console.waiting(f"sending {_SPLIT_REQUESTS} requests")
    with world.traffic(kept=_KEPT, fresh=_FRESH, pause=_PAUSE_S) as traffic:
        tally = traffic.wait_for(_SPLIT_REQUESTS)
        flows = world.datapath.maps.flows()
    console.bars(tally.split())
    check_split(console, tally, route.weights(world.manifests / route.FILE))
    everything = traffic.all()
    console.check(
        not everything.failures,
        f"no failure among {len(everything.outcomes)} requests",
        everything.why(),
    )
    _show_flows(world, console, flows)
    return _KEPT + len(everything.outcomes) - everything.kept


def check_split(console: Console, tally: Tally, weights: Mapping[str, int]) -> None:
    """Whether web-v2 got its share: five standard deviations of a fair draw are allowed."""
    share = weights[WEB_V2] / sum(weights.values())
    number = sum(tally.split().values()) or 1
    got = tally.split().get(WEB_V2, 0) / number
    allowed = 5 * math.sqrt(share * (1 - share) / number)
    console.check(
        abs(got - share) <= allowed,
        f"weights {weights[WEB_V1]} to {weights[WEB_V2]}",
        f"web-v2 got {got:.1%}, expected {share:.0%} ± {allowed:.1%} of {number}",
    )


def _show_flows(world: World, console: Console, flows: list[OpenFlow]) -> None:
    openers = {status.pod.netns_cookie: status.pod.name for status in world.enrollment.status()}
    hops: dict[str, list[OpenFlow]] = {}
    for flow in flows:
        hops.setdefault(_hop(openers.get(flow.flow.client_netns, "?"), flow), []).append(flow)
    console.say()
    console.say("Connections open a moment ago, from the datapath's own table:")
    console.table(
        ("hop", "open", "short-circuited", "original destination", "bytes there", "bytes back"),
        [
            (
                hop,
                len(group),
                sum(any(found.flow.messages) for found in group),
                _originals(group),
                sum(found.flow.bytes[Side.CLIENT] for found in group),
                sum(found.flow.bytes[Side.SERVER] for found in group),
            )
            for hop, group in sorted(hops.items())
        ],
    )


def _hop(opener: str, found: OpenFlow) -> str:
    pods = {address: name for name, address in ADDRESSES.items()}
    if found.flow.original.port:
        return f"{opener}: app -> sidecar"
    if found.key.netns:
        return f"{opener}: sidecar -> app"
    return f"{opener}'s sidecar -> {pods.get(str(found.key.server.ip()), '?')}'s sidecar"


def _originals(group: Iterable[OpenFlow]) -> str:
    kept = {str(found.flow.original) for found in group if found.flow.original.port}
    return ", ".join(sorted(kept)) or "not changed"


def _counters(world: World, console: Console, opened: int) -> None:
    found = {status.pod.name: status.counters for status in world.enrollment.status()}
    rows: list[tuple[object, ...]] = [
        (text, *(found[pod][counter] for pod in ENROLLED)) for counter, text in _SHOWN.items()
    ]
    rows.append(("directions left on plain TCP", *(_sum(found[pod], _PASSED) for pod in ENROLLED)))
    rows.append(("connections refused", *(_sum(found[pod], _REFUSED) for pod in ENROLLED)))
    console.say("And all since the enrollment, from its counters:")
    console.table(("", *ENROLLED), rows)
    steered = found[CLIENT][Counter.STEERED_OUTBOUND]
    console.check(
        steered == opened, "every connection of the client was steered", f"{steered} of {opened}"
    )
    inbound = [found[pod][Counter.STEERED_INBOUND] for pod in WEBS]
    console.check(
        all(inbound), "the web pods' sidecars took what came in", f"{sum(inbound)} connections"
    )
    moved = {pod: found[pod][Counter.REDIRECTED_BYTES] for pod in ENROLLED}
    console.check(
        all(moved.values()),
        "bytes took the short way, app to sidecar and sidecar to sidecar",
        f"{sum(moved.values()):,} bytes",
    )
    refused = sum(_sum(counters, _REFUSED) for counters in found.values())
    console.check(not refused, "no connection was refused", refused)


def _sum(counters: dict[Counter, int], chosen: Iterable[Counter]) -> int:
    return sum(counters[counter] for counter in chosen)


def _headers(answer: Answer) -> dict[str, Any]:
    return dict(answer.saw.get("headers", {}))


def _all_seen(world: World) -> list[Seen]:
    return [seen for pod in world.seen().values() for seen in pod]
