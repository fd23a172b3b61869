"""What conntrack knows of a zone (ctnetlink, linux/netfilter/nfnetlink_conntrack.h)."""

from pathlib import Path

from redirector.network import within

#: IPS_SEEN_REPLY of linux/netfilter/nf_conntrack_common.h.
_SEEN_REPLY = 1 << 1


def unanswered(netns: Path, zone: int) -> bool:
    """Whether something that was asked in this zone of a namespace has had no answer yet.

    A kernel that does not tell is taken to say so.
    """
    # Dear to import, and needed by who captures DNS alone.
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    def ask() -> bool:
        with NFCTSocket() as conntrack:
            return any(
                entry.get_attr("CTA_ZONE") == zone
                and not entry.get_attr("CTA_STATUS") & _SEEN_REPLY
                for entry in conntrack.dump()
            )

    try:
        return within(netns, ask)
    except (NetlinkError, OSError):
        return True
