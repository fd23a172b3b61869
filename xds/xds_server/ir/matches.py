"""How texts are compared, in routes and in policies."""

from dataclasses import dataclass
from enum import StrEnum


class MatchKind(StrEnum):
    """How a value is compared; a path's PREFIX counts whole segments in routes, characters in
    policies, as their specifications have it."""

    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    REGEX = "regex"


@dataclass(frozen=True, order=True)
class StringMatch:
    """A regex is RE2 and matches the whole value."""

    kind: MatchKind
    value: str


@dataclass(frozen=True, order=True)
class NamedMatch:
    """A header (name in lower case) or a query parameter."""

    name: str
    value: StringMatch
