"""Pods with more than one interface."""

from redirector.lab import LabPod

NEAR = ("10.78.0.1", "fd78::1")
FAR = ("10.78.0.2", "fd78::2")


def second_link(pod: LabPod, name: str, other: LabPod) -> tuple[tuple[str, str], tuple[str, str]]:
    """Join two pods by an interface beside the first; the addresses of both ends."""
    ip = ["ip", "link", "add", name, "type", "veth", "peer", "name", "far", "netns"]
    pod.run([*ip, other.netns.name], check=True)
    for lab, interface, addresses in ((pod, name, NEAR), (other, "far", FAR)):
        for address, length in zip(addresses, (24, 64), strict=True):
            argv = ["ip", "addr", "add", f"{address}/{length}", "dev", interface]
            lab.run([*argv, *(["nodad"] if ":" in address else [])], check=True)
        lab.run(["ip", "link", "set", interface, "up"], check=True)
    return NEAR, FAR
