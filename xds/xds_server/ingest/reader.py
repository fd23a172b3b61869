"""Reads untyped objects and never raises: what is wrong becomes a Problem, and reading goes on.

A getter that has reported a problem answers with something harmless of the right type (empty text,
the lower bound), which is never translated: an object that is bad by itself is not used.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from ipaddress import IPv6Network, ip_address, ip_network
from typing import TypeVar

from redirector.model import IPAddress, IPNetwork
from xds_server.errors import Problem, shown
from xds_server.ir import Name, NamedMatch
from xds_server.sources.objects import KubeObject

E = TypeVar("E", bound=StrEnum)
T = TypeVar("T")

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DNS_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
# RFC 1123. A dot would make NAME.NAMESPACE ambiguous, of which clusters and node ids are made.
_NAMESPACE = re.compile(_LABEL)
_MAPPED = IPv6Network("::ffff:0:0/96")
TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+")
"""RFC 9110, 5.6.2: what a header or method is made of."""

# JSON can say half a character, which no message can carry.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# RBAC objects, which are not ours, may have colons.
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9.:]*[a-z0-9])?")
_DURATION = re.compile(r"([0-9]{1,5}(h|m|s|ms)){1,4}")
_WITHOUT_NAMESPACE = ("Namespace", "Node")
#: Nested deep, groups take long to read.
_MOST_GROUPS = 100
_UNITS = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
# What Python's re takes and RE2 (Envoy's) does not: lookaround, conditions, backreferences, some
# flags and escapes, possessive repeats. Character classes and plain escapes are taken out first.
_PLAIN = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[^1-9ZuUN\x80-\U0010ffff]")
_NOT_RE2 = re.compile(
    r"\(\?(?:<?[=!]|\(|>|P=|#|[imsaLux-]*[aLux])|\\[^\x00-\x7f]|\\[1-9ZuUN]|[*+?}]\+|\(\?P<[^>]*[^\x00-\x7f>]"
)
# The same within a character class.
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_NOT_RE2_ESCAPE = re.compile(r"\\(?:[1-9ABZbuUN]|[^\x00-\x7f])")
_POSIX = "alnum|alpha|ascii|blank|cntrl|digit|graph|lower|print|punct|space|upper|word|xdigit"
_NOT_RE2_CLASS = re.compile(rf"\[:(?!\^?(?:{_POSIX}):\])")
_REPEATS = re.compile(r"\{[0-9,]*[0-9]{4}")
_COUNT = re.compile(r"\{([0-9]*),?([0-9]*)\}")
#: RE2 refuses more, all that are nested multiplied (RE2::kMaxRepeat).
_MOST_REPEATS = 1000
#: Written out, repeated parts become RE2's program, which has its bounds as well.
_MOST_WRITTEN_OUT = 10_000


@dataclass(frozen=True, eq=False, slots=True)
class Origin:
    """The object that a field is in, and where its problems go."""

    file: str
    subject: str
    problems: list[Problem]


@dataclass(eq=False, slots=True)
class Field:
    """A value somewhere in an object, with the way to it. A missing field and null are the same
    thing, as in Kubernetes."""

    value: object
    origin: Origin
    parent: "Field | None" = None
    key: str | int = ""

    def __getitem__(self, name: str) -> "Field":
        value = self.value
        if isinstance(value, dict):
            return Field(value.get(name), self.origin, self, name)
        if value is not None:
            self.problem("must be a mapping")
        return Field(None, self.origin, self, name)

    @property
    def present(self) -> bool:
        return self.value is not None

    @property
    def path(self) -> str:
        """Such as `spec.rules[0].backendRefs[1].weight`; made only when there is a problem."""
        if self.parent is None:
            return ""
        before = self.parent.path
        if isinstance(self.key, int):
            return f"{before}[{self.key}]"
        return f"{before}.{self.key}" if before else self.key

    def problem(self, message: str, *, own: bool = True) -> None:
        """The object is bad by itself."""
        self.origin.problems.append(self.found(message, own=own))

    def found(self, message: str, *, own: bool) -> Problem:
        """What is wrong here, for whoever keeps it."""
        value = shown(self.value) if self.present else ""
        return Problem(self.origin.file, self.origin.subject, self.path, value, message, own)

    def misfit(self, message: str) -> None:
        """The object is good, but does not fit the others there are: what it says here has no
        effect, the rest of it has."""
        self.problem(message, own=False)

    def only(self, *names: str, way_out: str = "remove it") -> None:
        """Reports every other field, because what is not understood must not be lost in silence."""
        if not isinstance(self.value, dict):
            if self.present:
                self.problem("must be a mapping")
            return
        for name in self.value:
            if name not in names and self.value[name] is not None:
                self[_key(name)].problem(f"is not supported (known: {', '.join(names)}); {way_out}")

    def items(self) -> list["Field"]:
        """The entries of a list; none when it is missing."""
        if not self.present:
            return []
        if not isinstance(self.value, list):
            self.problem("must be a list")
            return []
        fields = [Field(item, self.origin, self, index) for index, item in enumerate(self.value)]
        for field in fields:
            if not field.present:
                field.problem("must not be empty; remove it or fill it in")
        return [field for field in fields if field.present]

    def complete(self) -> None:
        """Reports keys without a value. Elsewhere they mean nothing, but a policy whose conditions
        were all commented out would hold for everything."""
        if isinstance(self.value, dict):
            for name in self.value:
                if self.value[name] is None:
                    self[_key(name)].problem("must not be empty; remove it or fill it in")

    def filled(self, way_out: str) -> list["Field"]:
        """The entries of a list that says something if it is there at all: an empty one is a
        mistake that could be read both as all and as nothing."""
        items = self.items()
        if self.value == []:
            self.problem(f"must not be empty; {way_out}")
        return items

    def _missing(self) -> None:
        self.problem("is required; add it")

    def text(self, default: str | None = None) -> str:
        if not self.present:
            if default is None:
                self._missing()
            return default or ""
        if not isinstance(self.value, str):
            self.problem("must be a string; put it in quotes")
            return default or ""
        if not self.value.isascii() and _SURROGATE.search(self.value):
            self.problem("must be valid Unicode; remove the lone surrogate")
            return default or ""
        return self.value

    def matching(self, pattern: re.Pattern[str], what: str, default: str | None = None) -> str:
        text = self.text(default)
        if isinstance(self.value, str) and (len(text) > 253 or not pattern.fullmatch(text)):
            self.problem(f"is not {what}")
        return text

    def namespace(self, default: str | None = None) -> str:
        return self.matching(_NAMESPACE, "a namespace: use a-z, 0-9 and '-'", default)

    def integer(self, low: int, high: int, default: int | None = None) -> int:
        if not self.present:
            if default is None:
                self._missing()
            return low if default is None else default
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.problem(f"must be a number from {low} to {high}")
            return low
        if not low <= self.value <= high:
            self.problem(f"must be from {low} to {high}")
            return low
        return self.value

    def port(self) -> int:
        return self.integer(1, 65535)

    def boolean(self, default: bool) -> bool:
        if not self.present:
            return default
        if not isinstance(self.value, bool):
            self.problem("must be true or false")
            return default
        return self.value

    def choice(self, kind: type[E], default: E) -> E:
        text = self.text(default.value)
        if text in list(kind):
            return kind(text)
        self.problem(f"must be one of {', '.join(kind)}")
        return default

    def labels(self) -> dict[str, str]:
        """A mapping from text to text; empty when it is missing."""
        if not self.present:
            return {}
        if not isinstance(self.value, dict):
            self.problem("must be a mapping")
            return {}
        return {_key(key): self[_key(key)].text() for key in self.value}

    def address(self) -> IPAddress | None:
        return self._parsed(ip_address, "an IP address such as 10.0.0.1 or fd00::1")

    def network(self) -> IPNetwork | None:
        """A CIDR; bits set behind the prefix are a mistake (Envoy would drop them unseen)."""
        return self._parsed(ip_network, "a network such as 10.0.0.0/8, zeros behind the prefix")

    def _parsed(self, parse: Callable[[str], T], what: str) -> T | None:
        text = self.text()
        if isinstance(self.value, str):
            try:
                # A scoped address means nothing on another machine, and traffic of IPv4-mapped
                # ones is IPv4 to Envoy.
                if "%" not in text and not _mapped(text):
                    return parse(text)
            except ValueError:
                pass
            self.problem(f"is not {what}")
        return None

    def duration(self) -> timedelta | None:
        """GEP-2257: up to four of hours, minutes, seconds and milliseconds; None when missing."""
        if not self.present:
            return None
        text = self.text()
        if not _DURATION.fullmatch(text):
            self.problem("is not a duration such as 10s, 500ms or 1h30m")
            return None
        parts = re.findall(r"([0-9]+)(ms|[hms])", text)
        return timedelta(milliseconds=sum(int(number) * _UNITS[unit] for number, unit in parts))

    def regex(self, default: str | None = None) -> str:
        text = self.text(default)
        if self.value == "":
            self.problem("must not be empty, which Envoy refuses; use .* to match everything")
            return ""
        if len(text) > 1024 or text.count("(") > _MOST_GROUPS:
            self.problem(
                "is too long for a regular expression; keep it within 1024 characters and "
                f"{_MOST_GROUPS} groups"
            )
            return ""
        try:
            # First of all, since what follows takes long where brackets are left open.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's plans for its own syntax
                re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            self.problem(f"is not a regular expression: {error}")
            return ""
        bare = _PLAIN.sub("c", text)
        classes = [part for part in _PLAIN.findall(text) if part.startswith("[")]
        if (
            _NOT_RE2.search(bare)
            or _REPEATS.search(bare)
            or any(not _re2_knows(part) for part in classes)
        ):
            self.problem(
                "is not an RE2 expression (no lookaround, backreferences, atomic groups, "
                "possessive repeats, \\Z, \\u, [\\b], [:unknown:], names or escapes beyond "
                "ASCII, nor more than 999 repeats); rewrite it without"
            )
            return ""
        repeats, length = _written_out(bare)
        if repeats > _MOST_REPEATS or length > _MOST_WRITTEN_OUT:
            self.problem(
                "repeats too much, which Envoy refuses: nested counts multiply, and may be "
                f"{_MOST_REPEATS} at most, and {_MOST_WRITTEN_OUT} characters when written out; "
                "repeat less"
            )
            return ""
        return text


def _written_out(expression: str) -> tuple[int, int]:
    """How often the counts of an expression (escapes and classes taken for one character) repeat
    its most repeated part, and how many characters it has with all of them written out."""
    outer: list[tuple[int, int]] = []
    #: Of the group so far, and of what was read last in it.
    most, length = 1, 0
    last = (1, 0)
    position = 0
    while position < len(expression):
        character = expression[position]
        position += 1
        if character == "{" and (count := _COUNT.match(expression, position - 1)):
            times = max(int(count[2] or count[1] or 1), 1)
            last = (last[0] * times, last[1] * times)
            position = count.end()
        elif character not in "*+?":
            most, length = max(most, last[0]), length + last[1]
            last = (1, 1)
            if character == "(":
                outer.append((most, length))
                most, length = 1, 0
            elif character == ")" and outer:
                last = (most, length)
                most, length = outer.pop()
    return max(most, last[0]), length + last[1]


def _key(name: object) -> str:
    """A mapping's key as a path shows it."""
    return name if isinstance(name, str) else shown(name)


def _re2_knows(character_class: str) -> bool:
    escapes = _ESCAPE.findall(character_class)
    return not (
        any(map(_NOT_RE2_ESCAPE.match, escapes)) or _NOT_RE2_CLASS.search(character_class, 1)
    )


def _mapped(text: str) -> bool:
    network = ip_network(text, strict=False)
    return isinstance(network, IPv6Network) and network.subnet_of(_MAPPED)


def first_of_each(matches: list[NamedMatch]) -> tuple[NamedMatch, ...]:
    """By name; of several under one name only the first counts (Gateway API, HTTPHeaderMatch)."""
    kept: dict[str, NamedMatch] = {}
    for match in matches:
        kept.setdefault(match.name, match)
    return tuple(kept[name] for name in sorted(kept))


@dataclass(frozen=True, eq=False)
class Item:
    """An object on its way in: who it is, and its fields."""

    name: Name
    kind: str
    source: KubeObject
    root: Field

    @property
    def subject(self) -> str:
        """As messages call it: `HTTPRoute demo/web`."""
        return self.root.origin.subject

    @property
    def file(self) -> str:
        return self.root.origin.file

    @property
    def spec(self) -> Field:
        return self.root["spec"]

    @property
    def problems(self) -> list[Problem]:
        """What was found so far."""
        return self.root.origin.problems

    @property
    def bad(self) -> bool:
        """Nothing of what was read of it may be used."""
        problems = self.root.origin.problems
        return bool(problems) and any(problem.own for problem in problems)

    @property
    def age(self) -> tuple[bool, str]:
        """Smaller is older; what does not say when it was made is the youngest."""
        metadata = self.source.data["metadata"]
        assert isinstance(metadata, dict)
        created = metadata.get("creationTimestamp")
        text = created if isinstance(created, str) else ""
        return (not text, text)

    def again(self) -> "Item":
        """The same object, without the problems found so far."""
        origin = replace(self.root.origin, problems=[])
        return replace(self, root=Field(self.source.data, origin))


def identify(source: KubeObject, problems: list[Problem]) -> tuple[str, Item] | None:
    """The object's apiVersion and the object; None, and problems, when it does not say what it
    is."""
    wrong: list[Problem] = []
    anonymous = Field(source.data, Origin(source.file, "", wrong))
    version, kind = anonymous["apiVersion"].text(), anonymous["kind"].text()
    metadata = anonymous["metadata"]
    name = metadata["name"].matching(_OBJECT_NAME, "a name: use a-z, 0-9, '-' and '.'")
    namespace = metadata["namespace"].namespace("default")
    where = name if kind in _WITHOUT_NAMESPACE else f"{namespace}/{name}"
    subject = f"{kind} {where}" if kind and name else ""
    if wrong:
        problems += (replace(problem, object=subject) for problem in wrong)
        return None
    root = Field(source.data, Origin(source.file, subject, []))
    return version, Item(Name(namespace, name), kind, source, root)
