"""Policies as Envoy's role-based access control, for HTTP and for bytes.

As Istio has it: a DENY that matches refuses; then, if any ALLOW holds for the pod, one of them
must match; else everything goes. On a TCP port nothing is known of HTTP, so a rule that asks for it
fails closed there: a DENY forgets its HTTP parts (and refuses more), an ALLOW never matches.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from envoy.config.core.v3 import config_source_pb2, extension_pb2
from envoy.config.listener.v3 import listener_components_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.config.route.v3 import route_components_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as http_rbac_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as hcm_pb2,
)
from envoy.extensions.filters.network.rbac.v3 import rbac_pb2 as network_rbac_pb2
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from xds_server.ir import (
    Action,
    MatchKind,
    NamedMatch,
    Operation,
    Policy,
    PolicyRule,
    Source,
    StringMatch,
)
from xds_server.translate.listeners import Filter
from xds_server.translate.messages import ads, cidr, packed, string_matcher

_ANYTHING = rbac_pb2.Permission(any=True)
_ANYONE = rbac_pb2.Principal(any=True)
_NOBODY = rbac_pb2.Principal(not_id=_ANYONE)
_NETWORK_RBAC = f"type.googleapis.com/{network_rbac_pb2.RBAC.DESCRIPTOR.full_name}"

_UNRESERVED = re.compile(r"[A-Za-z0-9\-._~/]*")
#: What begins a segment's parameters. Some applications decode before they look for it.
_SEMICOLON = "(?:;|%3[bB])"
#: What normalizing leaves in no path: an empty or a dot segment (of parameters alone is empty, too,
#: to those who take them off), a backslash, an encoded slash, backslash or unreserved character.
_UNNORMALIZED = (
    rf".*(?:/\.{{0,2}}(?:/|{_SEMICOLON})"
    r"|\\|%(?:2[d-fD-F]|3[0-9]|[46][1-9a-fA-F]|5[0-9acfACF]|7[0-9aeAE])).*"
    r"|.*/\.\.?"
)
_PARAMETERS = f"(?:{_SEMICOLON}[^/]*)?"
#: What no host name is made of.
_NOT_HOST = "[^-a-z0-9._]"
_ORDER = (Action.DENY, Action.ALLOW)


def http_filters() -> list[hcm_pb2.HttpFilter]:
    """The places in the filter chain; the rules come with the routes (`per_route`), so that a
    change of them closes no connection. Without those the second one refuses everything."""
    closed = http_rbac_pb2.RBAC(rules=rbac_pb2.RBAC(action=rbac_pb2.RBAC.Action.ALLOW))
    return [
        hcm_pb2.HttpFilter(name=_filter_name(action), typed_config=packed(closed))
        if action is Action.ALLOW
        else hcm_pb2.HttpFilter(
            name=_filter_name(action), typed_config=packed(http_rbac_pb2.RBAC())
        )
        for action in _ORDER
    ]


def per_route(policies: Sequence[Policy]) -> dict[str, Any]:
    """The rules for `http_filters`, by the filter's name."""
    found = {}
    for action in _ORDER:
        rules = _rules(policies, action, http=True)
        if action is Action.DENY and any(policy.judges_paths for policy in policies):
            rules = rules or rbac_pb2.RBAC(action=rbac_pb2.RBAC.Action.DENY)
            rules.policies["unnormalized path"].CopyFrom(_unnormalized())
        config = http_rbac_pb2.RBAC()
        if rules is not None:
            config = http_rbac_pb2.RBAC(rules=rules, rules_stat_prefix=f"{_word(action)}_")
        found[_filter_name(action)] = packed(http_rbac_pb2.RBACPerRoute(rbac=config))
    return found


def _unnormalized() -> rbac_pb2.Policy:
    """Normalizing comes with the listener. A connection that is older than the first policy to
    judge paths stays with the listener it has, where paths arrive as they were sent, for as long as
    Envoy drains it (10 minutes), but is under today's rules."""
    permission = rbac_pb2.Permission()
    permission.url_path.path.CopyFrom(string_matcher(StringMatch(MatchKind.REGEX, _UNNORMALIZED)))
    return rbac_pb2.Policy(permissions=[permission], principals=[_ANYONE])


def network_filters() -> list[Filter]:
    """The places before a TCP proxy; the rules come by themselves (`connection_rules`), so that a
    change of them closes no connection, and nothing else in the listener can hold them up. Until
    they have come, Envoy takes no connections."""
    source = config_source_pb2.ExtensionConfigSource(config_source=ads(), type_urls=[_NETWORK_RBAC])
    return [
        listener_components_pb2.Filter(name=_connections(action), config_discovery=source)
        for action in _ORDER
    ]


def connection_rules(policies: Sequence[Policy]) -> dict[str, Message]:
    """The rules for `network_filters`, by the filter's name."""
    found: dict[str, Message] = {}
    for action in _ORDER:
        config = network_rbac_pb2.RBAC(
            rules=_rules(policies, action, http=False), stat_prefix=f"{_word(action)}_"
        )
        name = _connections(action)
        found[name] = extension_pb2.TypedExtensionConfig(name=name, typed_config=packed(config))
    return dict(sorted(found.items()))


def form(policies: Iterable[Policy]) -> str:
    """Changes when somebody edits a policy, not when pods come and go."""
    said = "".join(f"{policy.name} {policy.action} {policy.form}\n" for policy in policies)
    return blake2b(said.encode(), digest_size=8).hexdigest()


def _connections(action: Action) -> str:
    return f"connections.{_word(action)}"


def _filter_name(action: Action) -> str:
    return f"rbac.{_word(action)}"


def _word(action: Action) -> str:
    return action.value.lower()


def _rules(policies: Iterable[Policy], action: Action, *, http: bool) -> rbac_pb2.RBAC | None:
    """None when no policy of this kind holds; an ALLOW without rules allows nothing."""
    chosen = [policy for policy in policies if policy.action is action]
    if not chosen:
        return None
    result = rbac_pb2.RBAC(action=rbac_pb2.RBAC.Action.Value(action.value))
    for policy in chosen:
        for number, rule in enumerate(policy.rules):
            built = _policy(rule, http=http, deny=action is Action.DENY)
            if built is not None:
                result.policies[f"{policy.name}/{number}"].CopyFrom(built)
    return result


def _policy(rule: PolicyRule, *, http: bool, deny: bool) -> rbac_pb2.Policy | None:
    """None for a rule that cannot match here."""
    if not http and rule.headers and not deny:
        return None
    operations = [
        _operation(operation, http=http, deny=deny)
        for operation in rule.operations
        if http or deny or not operation.needs_http
    ]
    if rule.operations and not operations:
        return None
    permission = _any_of(operations) if operations else _ANYTHING
    if http and rule.headers:
        headers = (_any_value(header) if deny else header for header in rule.headers)
        permission = _all_of([permission, *map(_header, headers)])
    principals = [_source(source) for source in rule.sources] or [_ANYONE]
    return rbac_pb2.Policy(permissions=[permission], principals=principals)


def _source(source: Source) -> rbac_pb2.Principal:
    """The peer's own address, never one that a header claims."""
    groups = []
    for networks in source.groups:
        if not networks:
            return _NOBODY
        ids = [rbac_pb2.Principal(direct_remote_ip=cidr(network)) for network in networks]
        groups.append(
            ids[0] if len(ids) == 1 else rbac_pb2.Principal(or_ids=rbac_pb2.Principal.Set(ids=ids))
        )
    if len(groups) == 1:
        return groups[0]
    return rbac_pb2.Principal(and_ids=rbac_pb2.Principal.Set(ids=groups))


def _operation(operation: Operation, *, http: bool, deny: bool) -> rbac_pb2.Permission:
    parts: list[rbac_pb2.Permission] = []
    if operation.ports:
        parts.append(
            _any_of([rbac_pb2.Permission(destination_port=port) for port in operation.ports])
        )
    if http:
        parts += (
            _any_of(permissions)
            for permissions in (
                [
                    _header(NamedMatch(":method", _method(method, deny=deny)))
                    for method in operation.methods
                ],
                [_path(path, deny=deny) for path in operation.paths],
                [
                    _header(NamedMatch(":authority", _authority(host, deny=deny)))
                    for host in operation.hosts
                ],
            )
            if permissions
        )
    return _all_of(parts) if parts else _ANYTHING


def _any_of(permissions: Sequence[rbac_pb2.Permission]) -> rbac_pb2.Permission:
    if len(permissions) == 1:
        return permissions[0]
    return rbac_pb2.Permission(or_rules=rbac_pb2.Permission.Set(rules=permissions))


def _all_of(permissions: Sequence[rbac_pb2.Permission]) -> rbac_pb2.Permission:
    if len(permissions) == 1:
        return permissions[0]
    return rbac_pb2.Permission(and_rules=rbac_pb2.Permission.Set(rules=permissions))


def _header(match: NamedMatch) -> rbac_pb2.Permission:
    header = route_components_pb2.HeaderMatcher(
        name=match.name, string_match=string_matcher(match.value)
    )
    return rbac_pb2.Permission(header=header)


def _any_value(match: NamedMatch) -> NamedMatch:
    """A header that is sent twice reaches the matcher as one, with a comma between the values: a
    DENY looks at each of them, so that none hides behind another. Nor behind spaces, which HTTP/2
    forbids around a value (RFC 9113, 8.2.1) and Envoy lets through."""
    value = match.value
    body = f"(?:{value.value})" if value.kind is MatchKind.REGEX else re.escape(value.value)
    end = ".*" if value.kind is MatchKind.PREFIX else r"[ \t]*(?:,.*)?"
    return NamedMatch(match.name, StringMatch(MatchKind.REGEX, rf"(?:.*,)?[ \t]*{body}{end}"))


def _path(match: StringMatch, *, deny: bool) -> rbac_pb2.Permission:
    """The path without its query. Normalizing decodes what RFC 3986 calls unreserved; any other
    character may reach the application raw or encoded, and is the same to it. So may be what
    follows a semicolon in a segment (RFC 3986, 3.3), which some applications take off: a DENY
    looks past it."""
    value, is_prefix = match.value, match.kind is MatchKind.PREFIX
    ends = value.count("/", 1) + (not is_prefix and not value.endswith("/")) if deny else 0
    if ends or not _UNRESERVED.fullmatch(value):
        segments = ["".join(map(_spellings, segment)) for segment in value[1:].split("/")]
        body = "/" + f"{_PARAMETERS if deny else ''}/".join(segments)
        end = ".*" if is_prefix else _PARAMETERS if deny else ""
        match = StringMatch(MatchKind.REGEX, body + end)
    result = rbac_pb2.Permission()
    result.url_path.path.CopyFrom(string_matcher(match))
    return result


def _spellings(character: str) -> str:
    if _UNRESERVED.fullmatch(character):
        return re.escape(character)
    encoded = "".join(f"%{byte:02x}" for byte in character.encode())
    raw = f"{re.escape(character)}|" if character.isascii() else ""
    return f"(?:{raw}(?i:{encoded}))"


def _method(method: str, *, deny: bool) -> StringMatch:
    """Methods have a case (RFC 9110, 9.1), which some applications do not heed: a DENY does not
    either."""
    if deny:
        return StringMatch(MatchKind.REGEX, f"(?i){re.escape(method)}")
    return StringMatch(MatchKind.EXACT, method)


def _authority(host: StringMatch, *, deny: bool) -> StringMatch:
    """A host in any case, with any port, with the colon of a port that is not told (RFC 3986,
    3.2.3), and also with the dot that ends a complete name. A DENY looks at each of several Host
    headers, which arrive as one with commas, past a user's name, past what is no port and past any
    number of dots."""
    before = ".*" if host.kind is MatchKind.SUFFIX else ""
    after = ".*" if host.kind is MatchKind.PREFIX else ""
    body = f"{before}{re.escape(host.value)}{after}"
    if deny:
        expression = rf"(?i)(?:.*{_NOT_HOST})?{body}\.*(?:{_NOT_HOST}.*)?"
        return StringMatch(MatchKind.REGEX, expression)
    return StringMatch(MatchKind.REGEX, rf"(?i){body}\.?(:[0-9]*)?")
