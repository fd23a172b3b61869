"""Which objects are the mesh's, and which of them is meant by a name."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from xds_server.errors import Problem, printable
from xds_server.groups import POLICY_VERSION, is_policy
from xds_server.ingest.lastgood import Forms, Key
from xds_server.ingest.reader import Item
from xds_server.memo import runs
from xds_server.sources.objects import KubeObject

_CLOSING = "AuthorizationPolicy"
_HARMLESS = "TrafficPolicy"


@dataclass(frozen=True)
class Sorted:
    """The mesh's objects by kind, each name once; what is somebody else's; namespaces of policies
    without a name; and what is wrong with objects that do not say what they are."""

    kinds: defaultdict[str, list[Item]] = field(default_factory=lambda: defaultdict(list))
    ignored: list[str] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def sort_by_kind(
    objects: Sequence[KubeObject], known: Collection[tuple[str, str]], forms: Forms
) -> Sorted:
    """`known` are the apiVersions and kinds that are of use."""
    result = Sorted()
    claims = _Claims()
    nameless: set[str] = set()
    for run in runs(objects):
        if not claims.all_of(forms.plain(run, known)):
            for source in run:
                if item := _claimant(source, known, forms, result, nameless):
                    claims.one(item)
    for item in forms.missing_from(nameless, set(claims.first)):
        claims.one(item)
    for key, item in claims.first.items():
        result.kinds[key[0]].append(
            _settled(claims.rivals[key], result) if key in claims.rivals else item
        )
    return result


class _Claims:
    """Who claims to be the object of a kind and name: the first, and all if there are more."""

    def __init__(self) -> None:
        self.first: dict[Key, Item] = {}
        self.rivals: dict[Key, list[Item]] = {}

    def all_of(self, items: Mapping[Key, Item] | None) -> bool:
        """Take in all of these, if nobody else claims to be one of them."""
        if items is None or not self.first.keys().isdisjoint(items):
            return False
        self.first.update(items)
        return True

    def one(self, item: Item) -> None:
        key = (item.kind, item.name)
        if key in self.first:
            self.rivals.setdefault(key, [self.first[key]]).append(item)
        else:
            self.first[key] = item


def _claimant(
    source: KubeObject,
    known: Collection[tuple[str, str]],
    forms: Forms,
    result: Sorted,
    nameless: set[str],
) -> Item | None:
    """The object, if it is the mesh's and says who it is."""
    if foreign := _foreign_without_name(source, known):
        result.ignored.append(foreign)
        return None
    identity = forms.identify(source, result.problems)
    if identity is None:
        nameless.add(source.file)
        result.suspects.update(_suspected(source))
        return None
    version, item = identity
    if (version, item.kind) in known:
        return item
    if not is_policy(version):
        result.ignored.append(printable(f"{item.subject} ({version})"))
        return None
    # A policy that is misspelt must not be taken for somebody else's object.
    item.root["kind"].problem(
        f"{version} has no such kind; use AuthorizationPolicy or TrafficPolicy of {POLICY_VERSION}"
    )
    return replace(item, kind=_meant(item.kind))


def _settled(rivals: list[Item], result: Sorted) -> Item:
    """Which of several objects with one name is in force."""
    first, *others = sorted(rivals, key=lambda item: (item.bad, item.age))
    for item in others:
        item.root["metadata"]["name"].misfit(
            f"{first.file} has the same {first.kind}, which is in force; remove one of them"
        )
        result.problems.extend(item.problems)
    return first


def _meant(kind: str) -> str:
    """What a misspelt kind of our own group is taken for: what might be a policy that refuses must
    not be lost."""
    return _HARMLESS if kind.lower().startswith(_HARMLESS[:4].lower()) else _CLOSING


def _suspected(source: KubeObject) -> set[str]:
    """The namespaces that a policy without a readable name, or a list of policies, may be for."""
    version, kind = source.data.get("apiVersion"), source.data.get("kind")
    if is_policy(version):
        if isinstance(kind, str) and _meant(kind) != _CLOSING:
            return set()
    elif isinstance(version, str) or kind != _CLOSING:
        return set()
    items = source.data.get("items")
    objects = items if isinstance(items, list) and items else [source.data]
    return set().union(*(_namespace_of(one) for one in objects))


def _namespace_of(data: object) -> set[str]:
    metadata = data.get("metadata") if isinstance(data, dict) else None
    namespace = metadata.get("namespace") if isinstance(metadata, dict) else None
    if namespace is None:
        return {"default"}
    return {namespace} if isinstance(namespace, str) else set()


def _foreign_without_name(source: KubeObject, known: Collection[tuple[str, str]]) -> str | None:
    """What to call an object of another program's kind that has no name (a kustomization)."""
    version, kind = source.data.get("apiVersion"), source.data.get("kind")
    metadata = source.data.get("metadata", {})
    if not isinstance(version, str) or not isinstance(kind, str) or (version, kind) in known:
        return None
    if is_policy(version) or not isinstance(metadata, dict):
        return None
    return None if "name" in metadata else printable(f"{kind} ({version})")
