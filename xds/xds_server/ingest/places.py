"""Pods, Services and EndpointSlices together: who is where, and what cannot be known of it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xds_server.ingest.addresses import Contested, contested
from xds_server.ingest.core import (
    Pod,
    RawService,
    Slice,
    read_pod,
    read_service,
    read_slice,
)
from xds_server.ingest.lastgood import Forms, Reading, readable
from xds_server.ingest.members import Members, members
from xds_server.ingest.policies import services_aimed_at
from xds_server.ingest.reader import Item
from xds_server.ir import Name
from xds_server.memo import Memo


@dataclass(frozen=True, eq=False)
class Places:
    """`pods` and `services` are those in force, also as rows of the memo (`all_pods` and
    `all_services`); bad pods are among them, without what cannot be known of them. `pieces` are the
    slices of each Service, `behind` says who stands behind which one, good or bad. It cannot be
    read whom `vague` Services select, nor who selects `opaque` pods. `named` are all Services that
    there are, good or bad."""

    pods: Mapping[Name, Pod]
    all_pods: tuple[Pod, ...]
    services: Mapping[Name, RawService]
    all_services: tuple[RawService, ...]
    pieces: Mapping[Name, Sequence[Slice]]
    behind: Members
    contested: Contested
    named: frozenset[Name]
    vague: frozenset[Name]
    opaque: frozenset[Name]


def read_places(kinds: Mapping[str, Sequence[Item]], forms: Forms) -> Places:
    """Policies are for bad pods, too, and for those that a bad Service selects."""
    memo = forms.memo
    pod_readings = forms.read_all(kinds["Pod"], read_pod)
    service_readings = forms.read_all(kinds["Service"], read_service)
    slice_readings = forms.read_all(kinds["EndpointSlice"], read_slice)
    good_pods = [(one.item, one.value) for one in pod_readings if one.good and one.value]
    good_services = [one.value for one in service_readings if one.good]
    bad_pods = [(one.item, one.value) for one in pod_readings if not one.good and one.value]
    bad_services = [one for one in service_readings if not one.good]
    claims = _contested(good_pods, good_services, memo)
    pods = {pod.name: pod for _, pod in good_pods}
    pods |= {pod.name: memo(Pod.uncertain, pod) for _, pod in bad_pods}
    services = {raw.name: raw.without(claims.services) for raw in good_services}
    all_pods, all_services = memo.row(pods.values()), memo.row(services.values())
    portless = [memo(RawService.without_ports, one.value) for one in bad_services]
    portless += _gone_services(kinds, forms)
    named = frozenset(one.item.name for one in service_readings)
    return Places(
        pods,
        all_pods,
        services,
        all_services,
        _by_service(slice_readings),
        members(
            all_pods, memo.row([*all_services, *portless]), _slices(slice_readings, memo), memo
        ),
        claims,
        memo.value(named),
        memo.value(_vague(bad_services)),
        _opaque(bad_pods),
    )


def _by_service(readings: Sequence[Reading[Slice | None]]) -> Mapping[Name, Sequence[Slice]]:
    found: dict[Name, list[Slice]] = defaultdict(list)
    for one in readings:
        if one.good and one.value:
            found[one.value.service].append(one.value)
    return found


def _slices(readings: Sequence[Reading[Slice | None]], memo: Memo) -> list[Slice]:
    """All of them; bad ones tell who belongs to a Service, and no more."""
    good = [one.value for one in readings if one.good and one.value]
    bad = [one.value for one in readings if not one.good and one.value]
    return [*good, *(memo(Slice.without_ports, piece) for piece in bad)]


def _vague(services: Sequence[Reading[RawService]]) -> frozenset[Name]:
    return frozenset(
        one.item.name
        for one in services
        if not readable(one.item, lambda item: item.spec["selector"].labels())
    )


def _opaque(pods: Sequence[tuple[Item, Pod]]) -> frozenset[Name]:
    return frozenset(
        pod.name
        for item, pod in pods
        if not readable(item, lambda item: item.root["metadata"]["labels"].labels())
    )


def _gone_services(kinds: Mapping[str, Sequence[Item]], forms: Forms) -> list[RawService]:
    """Services that are no more, but that a policy is for, in its form now or its last good one."""
    wanted: set[Name] = set()
    for item in kinds["AuthorizationPolicy"]:
        former = forms.former(item)
        wanted |= forms.memo(services_aimed_at, item)
        wanted |= services_aimed_at(former) if former else set()
    wanted -= {item.name for item in kinds["Service"]}
    return [forms.memo(_bare_service, item) for item in forms.gone("Service", wanted)]


def _bare_service(item: Item) -> RawService:
    return read_service(item).without_ports()


def _contested(
    pods: Sequence[tuple[Item, Pod]], services: Sequence[RawService], memo: Memo
) -> Contested:
    looked: list[Contested] = []

    def look() -> Contested:
        looked.append(contested(pods, services))
        return looked[0]

    found = memo.by((contested, memo.row(pod for _, pod in pods), memo.row(services)), look)
    # What is contested is to be said each time.
    return found if looked or not (found.pods or found.services) else look()
