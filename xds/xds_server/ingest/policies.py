"""AuthorizationPolicies (manifests/crds/authorizationpolicies.yaml)."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from redirector.model import IPNetwork
from xds_server.ingest.lookup import Lookup, collapsed
from xds_server.ingest.reader import TOKEN, Field, Item
from xds_server.ir import (
    Action,
    MatchKind,
    Name,
    NamedMatch,
    Operation,
    Policy,
    PolicyRule,
    Source,
    StringMatch,
)

_NOT_NORMAL = re.compile(r"//|/\.\.?(/|$)|[%\\\x00-\x1f\x7f]")


class _HeaderType(StrEnum):
    EXACT = "Exact"
    PREFIX = "Prefix"
    REGEX = "RegularExpression"


_HEADER_KINDS = {
    _HeaderType.EXACT: MatchKind.EXACT,
    _HeaderType.PREFIX: MatchKind.PREFIX,
    _HeaderType.REGEX: MatchKind.REGEX,
}


@dataclass(frozen=True, eq=False)
class PolicyReader:
    """Reads policies against the pods and services there are."""

    lookup: Lookup

    def read(self, item: Item) -> Policy:
        spec = item.spec
        if not spec.present:
            spec.problem("is required; add it")
        spec.complete()
        spec.only("targetRefs", "selector", "action", "rules")
        action = spec["action"].choice(Action, Action.ALLOW)
        rules = tuple(self._rule(item.name.namespace, action, r) for r in spec["rules"].items())
        return Policy(item.name, action, self._targets(item), rules, _form(item))

    def targets(self, item: Item) -> frozenset[Name] | None:
        """Whom a policy is for that cannot be read otherwise; None, its whole namespace, when that
        cannot be read either."""
        again = item.again()
        found = self._targets(again)
        return None if again.bad else found

    def _targets(self, item: Item) -> frozenset[Name] | None:
        spec, namespace = item.spec, item.name.namespace
        if spec["targetRefs"].present and spec["selector"].present:
            spec["selector"].problem("must not be given with targetRefs; keep one of them")
        if spec["targetRefs"].present:
            found: set[Name] = set()
            for reference in spec["targetRefs"].filled("remove it to mean the whole namespace"):
                found |= self._target(namespace, reference)
            return frozenset(found)
        if spec["selector"].present:
            selector = spec["selector"]
            selector.complete()
            selector.only("matchLabels", way_out="use matchLabels")
            wanted = selector["matchLabels"].labels()
            if not wanted:
                selector["matchLabels"].problem(
                    "must name a label; remove the selector to mean the whole namespace"
                )
            return self.lookup.selected(namespace, wanted)
        return None

    def _target(self, namespace: str, reference: Field) -> frozenset[Name]:
        reference.only("group", "kind", "name")
        if reference["group"].text("") != "":
            reference["group"].problem("must be '': Services and Pods are in the core group")
        name = Name(namespace, reference["name"].text())
        match reference["kind"].text():
            case "Service":
                service = self.lookup.service(name)
                if service.vague:
                    reference["name"].problem("its selector cannot be read; correct the Service")
                if service.there:
                    return service.pods
                # Those of one that is gone are known still (services_aimed_at).
                found = service.pods
            case "Pod":
                if self.lookup.has_pod(name):
                    return frozenset({name})
                found = frozenset()
            case _:
                reference["kind"].problem("must be Service or Pod")
                return frozenset()
        reference["name"].misfit(
            f"there is no {reference['kind'].value} {name}; create it or correct this"
        )
        return found

    def _rule(self, namespace: str, action: Action, rule: Field) -> PolicyRule:
        rule.complete()
        rule["when"].complete()
        rule.only("from", "to", "when")
        everyone = "remove it to mean every peer"
        everything = "remove it to mean every request"
        rule["when"].only("headers")
        return PolicyRule(
            tuple(
                self._source(namespace, action, source) for source in rule["from"].filled(everyone)
            ),
            tuple(_operation(operation) for operation in rule["to"].filled(everything)),
            tuple(_header(header) for header in rule["when"]["headers"].filled(everything)),
        )

    def _source(self, namespace: str, action: Action, source: Field) -> Source:
        source.complete()
        source.only("namespaces", "serviceAccounts", "cidrs")
        if source.value == {}:
            source.problem("says nothing; remove it to mean every peer")
        groups: list[tuple[IPNetwork, ...]] = []
        way_out = "remove it, or name one"
        namespaces = source["namespaces"]
        if namespaces.present:
            keys = [(field.namespace(),) for field in namespaces.filled(way_out)]
            groups.append(self.lookup.origin(keys, action))
        accounts = source["serviceAccounts"]
        if accounts.present:
            names = [_account(namespace, field) for field in accounts.filled(way_out)]
            groups.append(self.lookup.origin(names, action))
        cidrs = source["cidrs"]
        if cidrs.present:
            networks = [field.network() for field in cidrs.filled(way_out)]
            groups.append(collapsed(network for network in networks if network is not None))
        return Source(tuple(groups))


def _form(item: Item) -> str:
    return blake2b(repr(item.spec.value).encode(errors="replace"), digest_size=8).hexdigest()


def services_aimed_at(item: Item) -> frozenset[Name]:
    """The Services among a policy's targets, whatever else is wrong with it. It holds for the pods
    behind them also while these are gone: to make a Service anew must not open its pods."""
    spec = item.again().spec
    if not isinstance(spec.value, dict):
        return frozenset()
    return frozenset(
        Name(item.name.namespace, reference["name"].text())
        for reference in spec["targetRefs"].items()
        if reference["kind"].text("") == "Service"
    )


def _account(namespace: str, field: Field) -> tuple[str, str]:
    """`name` is of the policy's namespace, `namespace/name` of another."""
    parts = field.text().split("/")
    if len(parts) > 2 or not all(parts):
        field.problem("must be a service account's name or namespace/name")
    return (namespace if len(parts) < 2 else parts[0]), parts[-1]


def _operation(operation: Field) -> Operation:
    operation.complete()
    operation.only("methods", "paths", "hosts", "ports")
    if operation.value == {}:
        operation.problem("says nothing; remove it to mean every request")

    def each(name: str, read: Callable[[Field], StringMatch]) -> tuple[StringMatch, ...]:
        return tuple(read(field) for field in operation[name].filled("remove it, or name one"))

    return Operation(
        tuple(
            field.matching(TOKEN, "an HTTP method")
            for field in operation["methods"].filled("remove it, or name one")
        ),
        each("paths", _path),
        each("hosts", _host),
        tuple(field.port() for field in operation["ports"].filled("remove it, or name one")),
    )


def _path(field: Field) -> StringMatch:
    text = field.text()
    body = text.removesuffix("*")
    if text == "*":
        return StringMatch(MatchKind.PREFIX, "/")
    if not text.startswith("/") or "*" in body or "?" in body or "#" in body:
        field.problem("must be a path such as /admin, or the beginning of one such as /admin*")
    if _NOT_NORMAL.search(body):
        field.problem(
            "must be a normalized path, decoded (no '//', '/./', '/../', '%', '\\' or control "
            "characters): requests are normalized before they are judged, so this never matches"
        )
    return StringMatch(MatchKind.EXACT if body == text else MatchKind.PREFIX, body)


def _host(field: Field) -> StringMatch:
    text = field.text().lower()
    if text.startswith("*") and len(text) > 1:
        kind, body = MatchKind.SUFFIX, text[1:]
    elif text.endswith("*"):
        kind, body = MatchKind.PREFIX, text[:-1]
    else:
        kind, body = MatchKind.EXACT, text
    if not text or "*" in body or ":" in body or "/" in body:
        field.problem("must be a host name without a port, with * at its beginning or end at most")
    return StringMatch(kind, body)


def _header(header: Field) -> NamedMatch:
    header.only("name", "type", "value")
    name = header["name"].matching(TOKEN, "a header name").lower()
    if name == "host":
        header["name"].problem("use `to: [{hosts: [...]}]` for the host")
    kind = header["type"].choice(_HeaderType, _HeaderType.EXACT)
    value = header["value"]
    text = value.regex() if kind is _HeaderType.REGEX else value.text()
    if kind is _HeaderType.PREFIX and text == "":
        value.problem("must not be empty for a prefix; use the regular expression .* instead")
    return NamedMatch(name, StringMatch(_HEADER_KINDS[kind], text))
