"""Who may ask for what."""

from dataclasses import dataclass
from enum import StrEnum

from redirector.model import IPNetwork
from xds_server.ir.matches import NamedMatch, StringMatch
from xds_server.ir.names import Name


class Action(StrEnum):
    """What a policy does with a request that one of its rules matches."""

    ALLOW = "ALLOW"
    DENY = "DENY"


@dataclass(frozen=True)
class Source:
    """A peer's address must lie in one network of *each* group; an empty group matches nobody."""

    groups: tuple[tuple[IPNetwork, ...], ...]


@dataclass(frozen=True)
class Operation:
    """An empty part matches everything. Ports are the pod's, not a service's."""

    methods: tuple[str, ...] = ()
    paths: tuple[StringMatch, ...] = ()
    hosts: tuple[StringMatch, ...] = ()
    ports: tuple[int, ...] = ()

    @property
    def needs_http(self) -> bool:
        return bool(self.methods or self.paths or self.hosts)


@dataclass(frozen=True)
class PolicyRule:
    """One of the sources, one of the operations, and all of the headers must match; no source or
    no operation given matches everything."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()
    headers: tuple[NamedMatch, ...] = ()


@dataclass(frozen=True)
class Policy:
    """`targets` are the pods it holds for; None is every pod of its namespace. `form` stands for
    what is written in it, whatever addresses and pods that comes to."""

    name: Name
    action: Action
    targets: frozenset[Name] | None
    rules: tuple[PolicyRule, ...]
    form: str = ""

    @classmethod
    def refusal(cls, name: Name, targets: frozenset[Name] | None) -> "Policy":
        """Refuses everything."""
        return cls(name, Action.DENY, targets, (PolicyRule(),))

    @property
    def judges_paths(self) -> bool:
        return any(operation.paths for rule in self.rules for operation in rule.operations)
