"""Which objects are the mesh's, and which of them is meant by a name."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from xds_server.errors import Problem, printable
from xds_server.groups import POLICY_VERSION, is_policy
from xds_server.ingest.lastgood import Forms, Key
from xds_server.ingest.reader import Item
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
    claims: dict[Key, list[Item]] = defaultdict(list)
    nameless: set[str] = set()
    for source in objects:
        if foreign := _foreign_without_name(source, known):
            result.ignored.append(foreign)
            continue
        identity = forms.identify(source, result.problems)
        if identity is None:
            nameless.add(source.file)
            result.suspects.update(_suspected(source))
            continue
        version, item = identity
        if (version, item.kind) in known:
            claims[item.kind, item.name].append(item)
        elif is_policy(version):
            # A policy that is misspelt must not be taken for somebody else's object.
            item.root["kind"].problem(
                f"{version} has no such kind; use AuthorizationPolicy or TrafficPolicy of "
                f"{POLICY_VERSION}"
            )
            kind = _meant(item.kind)
            claims[kind, item.name].append(replace(item, kind=kind))
        else:
            result.ignored.append(printable(f"{item.subject} ({version})"))
    for item in forms.missing_from(nameless, set(claims)):
        claims[item.kind, item.name].append(item)
    for (kind, _), items in claims.items():
        if len(items) > 1:
            items.sort(key=lambda item: (item.bad, item.age))
        first, *others = items
        result.kinds[kind].append(first)
        for item in others:
            item.root["metadata"]["name"].misfit(
                f"{first.file} has the same {kind}, which is in force; remove one of them"
            )
            result.problems.extend(item.problems)
    return result


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
