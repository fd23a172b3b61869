"""Which pods stand behind which service, ready or not."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from redirector.model import IPAddress
from xds_server.ingest.core import Pod, RawPort, RawService, Slice, pairs, selects
from xds_server.ir import Name
from xds_server.memo import Memo

#: The service of a slice, its pods, which of the service's ports they serve on which of their own,
#: and the zones that it tells of pods.
_Behind: TypeAlias = tuple[
    Name, frozenset[Name], tuple[tuple[RawPort, int], ...], frozenset[tuple[Name, str]]
]
_Selected: TypeAlias = Mapping[Name, frozenset[Name]]


class Members:
    """Never changed once made, and the same object while nobody joins or leaves."""

    def __init__(self, selected: _Selected, behind: Iterable[_Behind]) -> None:
        self._pods: dict[Name, set[Name]] = defaultdict(set)
        self.ports: dict[Name, list[tuple[RawPort, int]]] = defaultdict(list)
        """For each pod, the service ports it serves, and on which port of its own."""
        self.zones: dict[Name, str] = {}
        """For each pod, the zone that slices tell."""
        for service, members, served, zones in behind:
            self._pods[service] |= members
            self.zones |= zones
            for member in members if served else ():
                self.ports[member] += served
        for service, members in selected.items():
            self._pods[service] |= members

    def of(self, service: Name) -> frozenset[Name]:
        return frozenset(self._pods.get(service, ()))


def members(
    pods: tuple[Pod, ...],
    services: tuple[RawService, ...],
    slices: Iterable[Slice],
    memo: Memo,
) -> Members:
    """`pods` and `services` are rows of the memo: a slice is looked at again when it, its service
    or any pod has changed."""
    addresses = memo(_addresses, pods)
    known = {service.name: service for service in services}
    behind = memo.row(
        memo.value(memo(_behind, piece, known.get(piece.service), addresses)) for piece in slices
    )
    return memo(Members, memo(_selected, pods, services), behind)


def _addresses(pods: tuple[Pod, ...]) -> Mapping[IPAddress, set[Name]]:
    found: dict[IPAddress, set[Name]] = defaultdict(set)
    for pod in pods:
        for address in () if pod.host_network else pod.addresses:
            found[address].add(pod.name)
    return dict(found)


def _behind(
    piece: Slice, service: RawService | None, addresses: Mapping[IPAddress, set[Name]]
) -> _Behind:
    found: set[Name] = set()
    zones: dict[Name, str] = {}
    for endpoint in piece.endpoints:
        pods = set().union(*(addresses.get(a, ()) for a in endpoint.addresses))
        if endpoint.pod is not None:
            pods.add(endpoint.pod)
        # Nobody decides on protocols and policies of another namespace's pods.
        own = {pod for pod in pods if pod.namespace == piece.service.namespace}
        found |= own
        if endpoint.zone:
            zones |= dict.fromkeys(own, endpoint.zone)
    served = tuple(pairs(service, piece))
    return piece.service, frozenset(found), served, frozenset(zones.items())


def _selected(pods: tuple[Pod, ...], services: tuple[RawService, ...]) -> _Selected:
    """Slices lag behind pods: a policy must hold from a pod's first moment."""
    by_label: dict[tuple[str, str, str], list[Pod]] = defaultdict(list)
    for pod in pods:
        for key, value in pod.labels.items():
            by_label[pod.name.namespace, key, value].append(pod)
    found: dict[Name, frozenset[Name]] = {}
    for service in services:
        for key, value in list(service.selector.items())[:1]:
            candidates = by_label.get((service.name.namespace, key, value), ())
            chosen = (pod for pod in candidates if selects(service.selector, pod.labels))
            found[service.name] = frozenset(pod.name for pod in chosen)
    return found
