"""Rules of HTTPRoutes and GRPCRoutes: what is taken, what is done with it, and where it goes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from xds_server.errors import Problem
from xds_server.ingest.core import RawService
from xds_server.ingest.reader import Field, Item
from xds_server.ingest.route_filters import FilterReader
from xds_server.ingest.route_matches import grpc_match, http_match
from xds_server.ir import (
    Backend,
    Filters,
    GrpcMatch,
    MatchKind,
    Name,
    PathPart,
    Protocol,
    Retry,
    RouteKind,
    RouteMatch,
    RouteRule,
)

REF_NOT_PERMITTED = "RefNotPermitted"
MAX_WEIGHT = 1_000_000
#: Envoy refuses weights whose sum has more than 32 bits; this is the limit of the Gateway API.
_MAX_BACKENDS = 16
_MAX_ATTEMPTS = 100
#: How often to try again where `retry` does not say; as Istio does.
_ATTEMPTS = 2


@dataclass(frozen=True)
class Unresolved:
    """A reference that leads to no backend: the reason, as the Gateway API names it, and why."""

    reason: str
    message: str


@dataclass(eq=False)
class RuleReader:
    """Reads the rules of one route. What is one rule's fault stays with it: such a rule is
    `broken`, which its requests are told, and named in `dropped`."""

    item: Item
    kind: RouteKind
    services: Mapping[Name, RawService]
    granted: Callable[[Name], bool]
    unresolved: list[Unresolved] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    incompatible: bool = False

    def read(self, rules: Field) -> tuple[RouteRule, ...]:
        """All rules. `dropped` stays empty if none of them is good."""
        fields = rules.items()
        found = [self._rule(one) for one in fields]
        if rules.value in (None, []) and self.kind is RouteKind.HTTP:
            # The API server's default, for HTTPRoutes only.
            rules.misfit("is missing: every request is answered with 500; add a rule")
            return (RouteRule((RouteMatch(),), ()),)
        names = [one["name"] for one in fields if one["name"].present]
        for number, name in enumerate(names):
            if any(name.value == other.value for other in names[:number]):
                name.misfit("is given twice; give each rule a name of its own")
        hopeless = all(rule.broken for rule, _ in found)
        for rule, problems in found:
            self.item.problems.extend(problems)
            if rule.broken and not hopeless:
                self.dropped.append(next(one for one in problems if one.own).field)
        return tuple(rule for rule, _ in found)

    def _rule(self, given: Field) -> tuple[RouteRule, list[Problem]]:
        rule, problems = _apart(given)
        http = self.kind is RouteKind.HTTP
        rule.only(
            *("name", "matches", "filters", "backendRefs", "sessionPersistence"),
            *(("timeouts", "retry") if http else ()),
        )
        if rule["sessionPersistence"].present:
            # Experimental; the rule serves without it.
            rule["sessionPersistence"].misfit("is not supported and has no effect; remove it")
        filters = FilterReader(self.kind, self._destination)
        timeouts = rule["timeouts"]
        timeouts.only("request", "backendRequest")
        whole, single = timeouts["request"].duration(), timeouts["backendRequest"].duration()
        if whole and single and single > whole:
            timeouts["backendRequest"].problem(
                "must not be longer than timeouts.request, which would cut it off first"
            )
        matches = tuple(self._matches(rule["matches"], problems))
        references = rule["backendRefs"].items()
        if len(references) > _MAX_BACKENDS:
            rule["backendRefs"].problem(f"must have at most {_MAX_BACKENDS} entries")
        common = filters.read(rule["filters"])
        if common.redirect and references:
            rule["backendRefs"].problem("must not be given with RequestRedirect; keep one of them")
        backends = tuple(self._backend(one, filters) for one in references)
        self._check_prefixes(rule, matches, common, backends)
        retry = _retry(rule["retry"])
        self.incompatible = self.incompatible or filters.incompatible
        broken = any(problem.own for problem in problems)
        name = rule["name"].text("")
        return RouteRule(matches, backends, common, whole, single, retry, broken, name), problems

    def _matches(self, given: Field, problems: list[Problem]) -> Iterator[RouteMatch | GrpcMatch]:
        """The good ones: of a bad one nobody knows which requests it means."""
        http = self.kind is RouteKind.HTTP
        fields = given.items()
        if not fields and given.value in (None, []):
            yield RouteMatch() if http else GrpcMatch()
        for one in fields:
            match, wrong = _apart(one)
            read = http_match(match) if http else grpc_match(match)
            problems += wrong
            if not wrong:
                yield read

    def _check_prefixes(
        self,
        rule: Field,
        matches: tuple[RouteMatch | GrpcMatch, ...],
        common: Filters,
        backends: tuple[Backend, ...],
    ) -> None:
        """Only what a match names as a prefix can be replaced."""
        every = [common, *(backend.filters for backend in backends)]
        changes = [one.redirect.path if one.redirect else one.rewrite.path for one in every]
        if any(change and change.part is PathPart.PREFIX for change in changes) and not all(
            isinstance(match, RouteMatch) and match.path.kind is MatchKind.PREFIX
            for match in matches
        ):
            rule["matches"].problem(
                "must be of type PathPrefix, each of them, for ReplacePrefixMatch"
            )

    def _backend(self, reference: Field, filters: FilterReader) -> Backend:
        reference.only("group", "kind", "namespace", "name", "port", "weight", "filters")
        weight = reference["weight"].integer(0, MAX_WEIGHT, 1)
        own = filters.read(reference["filters"])
        found = self._found(reference)
        name, number = self._named(reference), reference["port"].value
        port = number if isinstance(number, int) else 0
        return Backend(name, port, weight, own, found)

    def _destination(self, reference: Field) -> tuple[Name, int] | None:
        """Of a mirror."""
        reference.only("group", "kind", "namespace", "name", "port")
        found = self._found(reference)
        return (self._named(reference), reference["port"].port()) if found else None

    def _named(self, reference: Field) -> Name:
        return Name(
            reference["namespace"].namespace(self.item.name.namespace), reference["name"].text()
        )

    def _found(self, reference: Field) -> bool:
        """Whether requests can go there."""
        name = self._named(reference)
        if reference["group"].text("") != "" or reference["kind"].text("Service") != "Service":
            return self._lost(
                reference["kind"], "InvalidKind", "only a Service (group '') can be used"
            )
        number = reference["port"].port()
        if not self.granted(name):
            # Said first, and alone: whether the service exists is not for this namespace to know.
            return self._lost(
                reference["namespace"],
                REF_NOT_PERMITTED,
                f"a ReferenceGrant in namespace {name.namespace} must allow {self.kind}s of "
                f"{self.item.name.namespace} to refer to Service {name.name}",
            )
        service = self.services.get(name)
        if service is None:
            why = f"there is no Service {name}; create it or correct this"
            return self._lost(reference["name"], "BackendNotFound", why)
        port = service.port(number)
        if port is None:
            why = f"Service {name} has no such port; {ports(service)}"
            return self._lost(reference["port"], "BackendNotFound", why)
        if port.declared is Protocol.TCP:
            why = f"that port of Service {name} is not HTTP; set its appProtocol to http"
            return self._lost(reference["port"], "UnsupportedProtocol", why)
        return True

    def _lost(self, place: Field, reason: str, why: str) -> bool:
        if place.present or reason != "BackendNotFound":
            place.misfit(why if reason != REF_NOT_PERMITTED else f"{reason}: {why}")
        self.unresolved.append(Unresolved(reason, f"{place.path}: {why}"))
        return False


def ports(service: RawService) -> str:
    """Which ports there are, for people."""
    numbers = ", ".join(str(port.number) for port in service.ports)
    return f"it has {numbers}" if numbers else "it has none"


def _retry(retry: Field) -> Retry | None:
    """An HTTPRouteRetry."""
    retry.only("codes", "attempts", "backoff")
    codes = sorted({code.integer(400, 599) for code in retry["codes"].items()})
    attempts = retry["attempts"].integer(0, _MAX_ATTEMPTS, _ATTEMPTS)
    backoff = retry["backoff"].duration()
    return Retry(attempts, tuple(codes), backoff) if retry.present else None


def _apart(given: Field) -> tuple[Field, list[Problem]]:
    """The field with a list of problems of its own."""
    problems: list[Problem] = []
    return replace(given, origin=replace(given.origin, problems=problems)), problems
