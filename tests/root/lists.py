"""Lists of ranges as long as a cloud provider's."""

from collections.abc import Iterable
from ipaddress import ip_network
from itertools import islice

from redirector.lab import LabPod
from redirector.model import IPNetwork, Steering

ENTRIES = 10_000


def filler(v4: str, v6: str) -> tuple[IPNetwork, ...]:
    """Ranges of several lengths that nobody of the test is in."""
    small = [ip_network(v4).subnets(new_prefix=length) for length in (24, 26)]
    large = [ip_network(v6).subnets(new_prefix=length) for length in (48, 64)]
    return tuple(net for nets in (*small, *large) for net in islice(nets, ENTRIES // 2))


def single(addresses: Iterable[str]) -> tuple[IPNetwork, ...]:
    return tuple(ip_network(address) for address in addresses)


def long_lists(included: LabPod, both: LabPod) -> Steering:
    return Steering(
        include_outbound_cidrs=filler("100.64.0.0/10", "fd64::/16")
        + single((included.ip, included.ip6, both.ip, both.ip6)),
        exclude_outbound_cidrs=filler("11.0.0.0/8", "fd65::/16") + single((both.ip, both.ip6)),
    )
