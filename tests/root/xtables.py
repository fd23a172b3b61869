"""The iptables mode's rules and sets in a pod of the lab."""

from redirector.lab import LabPod
from redirector.model import Mode, Pod, Steering
from redirector.network import addresses, netns_cookie

FLAVOURS = {"nft": "xtables-nft-multi", "legacy": "xtables-legacy-multi"}
PROGRAMS = [f"ip{six}tables{verb}" for six in ("", "6") for verb in ("", "-restore", "-save")]


def as_pod(lab: LabPod, steering: Steering | None = None) -> Pod:
    return Pod(
        lab.name,
        lab.netns,
        lab.cgroup,
        Mode.IPTABLES,
        steering=steering or Steering(),
        addresses=addresses(lab.netns),
        netns_cookie=netns_cookie(lab.netns),
    )


def saved(lab: LabPod) -> str:
    """All NAT rules of both families; without the packet counters and dates."""
    text = "".join(lab.run([f"ip{six}tables-save"], check=True).stdout for six in ("", "6"))
    return "\n".join(line.split(" [")[0] for line in text.splitlines() if line[:1] != "#")


def sets(lab: LabPod) -> list[str]:
    """The names of all sets of the pod's namespace."""
    return lab.run(["ipset", "list", "-n"], check=True).stdout.split()
