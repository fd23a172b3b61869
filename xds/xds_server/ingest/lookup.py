"""What policies are read against, and what each of them looked at there.

A pod that comes or goes concerns few policies, and to read thousands again takes seconds: one is
read again only if something that it asked for has another answer.
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import Any, TypeAlias

from redirector.model import IPAddress, IPNetwork
from xds_server.ingest.core import Pod, selects
from xds_server.ingest.members import Members
from xds_server.ir import Action, Name
from xds_server.memo import Memo

#: Every interface with IPv6 has such an address, and no object tells of it.
_LINK_LOCAL = IPv6Network("fe80::/10")

#: A method that finds the answer, and its arguments.
_Question: TypeAlias = tuple[Any, ...]


class Origins:
    """Which addresses traffic of a namespace or service account comes from.

    A pod in its node's network shares its address with the whole node. So it cannot be allowed by
    name, which would let all of them in, but it can be denied. So may an address that two pods
    claim (`shared`), and one that is good on the link only: whose it is nobody tells.
    """

    def __init__(self, pods: Collection[Pod], shared: Collection[IPAddress]) -> None:
        nodes = {a for pod in pods if pod.host_network for a in pod.addresses}
        self._own: dict[tuple[str, ...], set[IPNetwork]] = defaultdict(set)
        self._any: dict[tuple[str, ...], set[IPNetwork]] = defaultdict(set)
        for pod in pods:
            namespace = pod.name.namespace
            for key in ((namespace,), (namespace, pod.service_account)):
                self._any[key] |= {ip_network(address) for address in pod.addresses}
                if not pod.host_network:
                    own = {*pod.addresses}.difference(shared, nodes)
                    self._own[key] |= {ip_network(address) for address in own}

    def of(self, keys: Iterable[tuple[str, ...]], action: Action) -> tuple[IPNetwork, ...]:
        known = self._own if action is Action.ALLOW else self._any
        found = {network for key in keys for network in known.get(key, ())}
        if action is Action.DENY and found:
            found.add(_LINK_LOCAL)
        return collapsed(found)


def collapsed(networks: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    """The fewest networks that hold the same addresses, sorted."""
    found = set(networks)
    four = collapse_addresses(n for n in found if isinstance(n, IPv4Network))
    six = collapse_addresses(n for n in found if isinstance(n, IPv6Network))
    return (*four, *six)


@dataclass(frozen=True)
class Target:
    """A Service that a policy names: whether it is there, whether it can be read whom it selects,
    and the pods behind it, which are known also of one that is gone."""

    there: bool
    vague: bool
    pods: frozenset[Name]


@dataclass(eq=False)
class Seen:
    """What a policy asked for when it was read last, and the answers; `reading` stands for that."""

    asked: dict[_Question, Hashable] = field(default_factory=dict)
    reading: object = field(default_factory=object)


@dataclass(eq=False)
class Lookup:
    """The pods and Services that there are; whom `vague` Services select cannot be read. An answer
    is the very same value as long as it says the same."""

    pods: Collection[Pod]
    services: Collection[Name]
    vague: Collection[Name]
    members: Members
    origins: Origins
    memo: Memo
    #: What was asked for since the last `renew`.
    asked: dict[_Question, Hashable] = field(default_factory=dict)
    _answers: dict[_Question, Hashable] = field(default_factory=dict)
    _by_namespace: dict[str, list[Pod]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pod in self.pods:
            self._by_namespace.setdefault(pod.name.namespace, []).append(pod)
        self._names = {pod.name for pod in self.pods}

    def service(self, name: Name) -> Target:
        """A Service by its name."""
        found: Target = self._ask((Lookup._service, name))
        return found

    def has_pod(self, name: Name) -> bool:
        """Whether there is such a pod."""
        found: bool = self._ask((Lookup._pod, name))
        return found

    def selected(self, namespace: str, labels: Mapping[str, str]) -> frozenset[Name]:
        """The pods with these labels."""
        found: frozenset[Name] = self._ask((Lookup._selected, namespace, *labels.items()))
        return found

    def origin(self, keys: Iterable[tuple[str, ...]], action: Action) -> tuple[IPNetwork, ...]:
        """As `Origins.of`."""
        found: tuple[IPNetwork, ...] = self._ask((Lookup._origin, action, *keys))
        return found

    def renew(self, seen: Seen) -> None:
        """Have a policy read again that would get another answer than it got. To be called before
        its turn, and `note` after it."""
        self.asked = {}
        if any(self._answer(question) is not answer for question, answer in seen.asked.items()):
            seen.asked, seen.reading = {}, object()

    def note(self, seen: Seen) -> None:
        """What was asked for since is what this policy looks at, too."""
        seen.asked |= self.asked

    def _ask(self, question: _Question) -> Any:
        answer = self.asked[question] = self._answer(question)
        return answer

    def _answer(self, question: _Question) -> Hashable:
        if question not in self._answers:
            find, *arguments = question
            self._answers[question] = self.memo.value(find(self, *arguments))
        return self._answers[question]

    def _service(self, name: Name) -> Target:
        return Target(name in self.services, name in self.vague, self.members.of(name))

    def _pod(self, name: Name) -> bool:
        return name in self._names

    def _selected(self, namespace: str, *labels: tuple[str, str]) -> frozenset[Name]:
        wanted = dict(labels)
        pods = self._by_namespace.get(namespace, ())
        return frozenset(pod.name for pod in pods if selects(wanted, pod.labels))

    def _origin(self, action: Action, *keys: tuple[str, ...]) -> tuple[IPNetwork, ...]:
        return self.origins.of(keys, action)
