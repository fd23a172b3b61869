"""What stands in the place of policies that nobody can read: everything is refused."""

from collections.abc import Collection, Iterable

from xds_server.ingest.lastgood import Forms
from xds_server.ingest.lookup import Seen
from xds_server.ingest.policies import PolicyReader
from xds_server.ingest.reader import Item
from xds_server.ir import Name, Policy

#: In a policy's name this is no object of Kubernetes.
_UNREADABLE = "(unreadable)"


def read_policies(
    items: Iterable[Item],
    reader: PolicyReader,
    forms: Forms,
    opaque: Collection[Name],
    suspects: Collection[str],
) -> tuple[list[Policy], list[str]]:
    """The policies, and in whose place everything is refused: of policies that never were good, of
    pods whose labels cannot be read (`opaque`) where there are policies, and in the `suspects`,
    namespaces whose policies could not even be told from other things."""
    lookup = reader.lookup
    policies: list[Policy] = []
    closed: list[str] = []
    for item in items:
        seen = forms.memo(_seen, item)
        lookup.renew(seen)
        reading = forms.read(item, reader.read, (seen.reading,))
        lookup.note(seen)
        if reading.good:
            policies.append(reading.value)
        else:
            policies.append(Policy.refusal(item.name, reader.targets(item)))
            closed.append(item.subject)
    governed = {policy.name.namespace for policy in policies}
    for pod in sorted(opaque):
        if pod.namespace in governed:
            name = Name(pod.namespace, f"{_UNREADABLE} {pod.name}")
            policies.append(Policy.refusal(name, frozenset({pod})))
            closed.append(f"Pod {pod}")
    for namespace in sorted(suspects):
        policies.append(Policy.refusal(Name(namespace, _UNREADABLE), None))
        closed.append(f"Namespace {namespace}")
    return policies, closed


def _seen(_item: Item) -> Seen:
    """One for each policy, for as long as it is the same object."""
    return Seen()
