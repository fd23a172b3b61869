"""Which TrafficPolicy holds where: targets are looked up, and conflicts decided.

Of two policies that are attached to one place the older holds, else the first by name (Gateway API,
GEP-713, "Conflict Resolution"). One that names a Service's port goes before one that names the
whole Service.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from xds_server.conditions import CONFLICTED, PARTIALLY_INVALID, Condition, ObjectStatus
from xds_server.errors import Problem
from xds_server.ingest.core import RawPort, RawService
from xds_server.ingest.members import Members
from xds_server.ingest.policy_status import (
    TARGET_NOT_FOUND,
    accepted,
    policy_status,
    refused,
)
from xds_server.ingest.reader import Field
from xds_server.ingest.traffic import RawTraffic, Target
from xds_server.ir import Name, Parent, PodPort, Protocol, Route, RouteRule, TrafficPolicy

K = TypeVar("K")

#: Rules of a route, by its kind, its name and theirs; None is all of them.
RouteSection = tuple[str, Name, str | None]

#: Why a policy holds only in part: reason and message.
_Lack = tuple[str, str]


#: The names of rules, with their route's kind and name; empty for a rule without one.
RuleNames = frozenset[tuple[str, Name, str]]


@dataclass(frozen=True, eq=False)
class _Places:
    """What policies can be attached to. `served` has the service ports that a pod serves and its
    own ports for them."""

    services: Mapping[Name, RawService]
    protocols: Mapping[RawPort, Protocol]
    served: Mapping[Name, Iterable[tuple[RawPort, int]]]
    routes: Collection[tuple[str, Name]]
    rules: RuleNames


@dataclass(eq=False)
class _Claims:
    """Who has which place; the first to come keeps it."""

    services: dict[Name, RawTraffic] = field(default_factory=dict)
    ports: dict[Parent, RawTraffic] = field(default_factory=dict)
    routes: dict[RouteSection, RawTraffic] = field(default_factory=dict)
    pods: dict[PodPort, RawTraffic] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def misfit(self, at: Field, message: str) -> None:
        """Kept here, not with the object, which may be read once and attached many times."""
        self.problems.append(at.found(message, own=False))


@dataclass(frozen=True, eq=False)
class Attached:
    """The policies with their places, those that hold for routes' rules, and what to tell of each:
    statuses, and what of a policy has no effect."""

    policies: tuple[TrafficPolicy, ...]
    routes: Mapping[RouteSection, TrafficPolicy]
    statuses: tuple[ObjectStatus, ...]
    problems: tuple[Problem, ...]


def with_traffic(route: Route, kind: str, attached: Attached) -> Route:
    """The route with what policies say of its rules: of one by its name, else of all."""
    everywhere = attached.routes.get((kind, route.name, None))

    def given(rule: RouteRule) -> RouteRule:
        named = attached.routes.get((kind, route.name, rule.name)) if rule.name else None
        policy = named or everywhere
        if policy is None:
            return rule
        part = f" {rule.name}" if named else ""
        return replace(
            rule,
            rate_limit=policy.rate_limit,
            limited_as=f"{kind} {route.name}{part}" if policy.rate_limit else "",
            fault=policy.fault,
        )

    rules = tuple(map(given, route.rules))
    return route if rules == route.rules else replace(route, rules=rules)


def attach(
    policies: Sequence[RawTraffic],
    services: Sequence[RawService],
    protocols: Mapping[RawPort, Protocol],
    behind: Members,
    rules: RuleNames,
) -> Attached:
    """Where each policy holds, and what to tell of it."""
    if not policies:
        return Attached((), {}, (), ())
    places = _Places(
        {service.name: service for service in services},
        protocols,
        behind.ports,
        {(kind, name) for kind, name, _ in rules},
        rules,
    )
    ordered = sorted(policies, key=lambda raw: (raw.item.age, raw.item.name))
    claims = _Claims()
    told = {raw: [_claim(raw, target, places, claims) for target in raw.targets] for raw in ordered}
    held: dict[RawTraffic, set[Parent]] = {raw: set() for raw in ordered}
    for service in places.services.values():
        for port in service.ports:
            parent = Parent(service.name, port.number)
            winner = claims.ports.get(parent) or claims.services.get(service.name)
            if winner is not None:
                held[winner].add(parent)
    pods_behind = _behind(places)
    found, statuses = [], []
    for raw in ordered:
        pods, more = _arrivals(raw, held[raw], pods_behind, claims)
        policy = replace(
            raw.policy,
            services=frozenset(held[raw]),
            pods=frozenset(pods),
        )
        found.append(policy)
        lacks = [*more, *_without_effect(policy, places)]
        for _, message in lacks:
            claims.misfit(raw.item.spec, message)
        statuses.append(_status(raw, told[raw], lacks))
    return Attached(
        tuple(sorted(found, key=lambda policy: policy.name)),
        {section: owner.policy for section, owner in claims.routes.items()},
        tuple(statuses),
        tuple(claims.problems),
    )


def _claim(
    raw: RawTraffic, target: Target, places: _Places, claims: _Claims
) -> tuple[Condition, ...]:
    """The conditions of a policy under one of its targets."""

    def take(taken: dict[K, RawTraffic], place: K) -> tuple[Condition, ...]:
        owner = taken.setdefault(place, raw)
        if owner is raw:
            return accepted()
        message = f"{owner.item.subject} is older and holds here; remove one of them"
        claims.misfit(target.field, message)
        return (*refused(CONFLICTED, message), Condition(CONFLICTED, True, CONFLICTED, message))

    def lost(at: Field, message: str) -> tuple[Condition, ...]:
        claims.misfit(at, f"{message}; correct this, or create it")
        return refused(TARGET_NOT_FOUND, message)

    where = f"{target.kind} {target.name}"
    if target.kind == "Service":
        service = places.services.get(target.name)
        if service is None:
            return lost(target.field["name"], f"there is no {where}")
        if target.section is None:
            return take(claims.services, target.name)
        port = _port(service, target.section)
        if port is None:
            names = ", ".join(p.name or str(p.number) for p in service.ports) or "none"
            lack = f"{where} has no port {target.section}, but {names}"
            return lost(target.field["sectionName"], lack)
        return take(claims.ports, Parent(target.name, port.number))
    if (target.kind, target.name) not in places.routes:
        return lost(target.field["name"], f"there is no {where}")
    rule = (target.kind, target.name, target.section or "")
    if target.section is not None and rule not in places.rules:
        lack = f"{where} has no rule named {target.section}"
        return lost(target.field["sectionName"], lack)
    return take(claims.routes, (target.kind, target.name, target.section))


def _port(service: RawService, section: str) -> RawPort | None:
    """By name, or by number, since the only port of a service needs no name."""
    return next((p for p in service.ports if section in (p.name, str(p.number))), None)


def _behind(places: _Places) -> dict[Parent, list[PodPort]]:
    owners = {
        port: Parent(service.name, port.number)
        for service in places.services.values()
        for port in service.ports
    }
    found: dict[Parent, list[PodPort]] = {}
    for pod, served in places.served.items():
        for port, number in served:
            if port in owners:
                found.setdefault(owners[port], []).append(PodPort(pod, number))
    return found


def _arrivals(
    raw: RawTraffic,
    parents: Iterable[Parent],
    behind: Mapping[Parent, Iterable[PodPort]],
    claims: _Claims,
) -> tuple[set[PodPort], list[_Lack]]:
    """The pods' ports that the policy judges arriving traffic on. A pod cannot tell which service
    a connection was meant for: with two services before one port, the older policy has it."""
    policy = raw.policy
    if not policy.arrives:
        return set(), []
    wanted = {place for parent in parents for place in behind.get(parent, ())}
    lost = {place: claims.pods.setdefault(place, raw) for place in sorted(wanted)}
    told = {owner.item.subject: place for place, owner in lost.items() if owner is not raw}
    lacks = [
        (
            CONFLICTED,
            f"another Service leads to port {place.port} of pod {place.pod}, too, and the older "
            f"{subject} holds there",
        )
        for subject, place in sorted(told.items())
    ]
    return {place for place, owner in lost.items() if owner is raw}, lacks


def _without_effect(policy: TrafficPolicy, places: _Places) -> list[_Lack]:
    """What the policy asks of services that cannot have it."""
    services = sorted({parent.service for parent in policy.services})
    raw = {name: places.services[name] for name in services}
    found: list[str] = []

    def lacking(parts: str, why: str, where: Iterable[object]) -> None:
        if named := ", ".join(map(str, where)):
            found.append(f"{parts}: no effect {why}: {named}")

    if policy.fault:
        bare = (
            f"{port.number} of Service {name}"
            for name in services
            for port in raw[name].ports
            if Parent(name, port.number) in policy.services and not places.protocols[port].is_http
        )
        lacking("faultInjection", "on ports that are not HTTP", bare)
        lacking(
            "faultInjection",
            "on Services without an address, whose pods are asked directly",
            (name for name in services if not raw[name].addresses),
        )
    if policy.arrives:
        lacking(
            "rateLimit, connectionLimit and accessLog",
            "on Services of type ExternalName, which no pod serves",
            (name for name in services if raw[name].external),
        )
    return [("UnsupportedValue", message) for message in found]


def _status(
    raw: RawTraffic, told: Iterable[tuple[Condition, ...]], lacks: Sequence[_Lack]
) -> ObjectStatus:
    partly: tuple[Condition, ...] = ()
    if lacks:
        text = "; ".join(message for _, message in lacks)
        partly = (Condition(PARTIALLY_INVALID, True, lacks[0][0], text),)
    return policy_status(
        raw.item,
        [
            (target.field, (*conditions, *(partly if conditions[0].status else ())))
            for target, conditions in zip(raw.targets, told, strict=True)
        ],
    )
