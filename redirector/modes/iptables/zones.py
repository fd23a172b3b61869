"""What conntrack knows of a zone (ctnetlink, linux/netfilter/nfnetlink_conntrack.h)."""

from pathlib import Path
from typing import NamedTuple

from redirector.network import within

#: IPS_SEEN_REPLY of linux/netfilter/nf_conntrack_common.h.
_SEEN_REPLY = 1 << 1


class Questions(NamedTuple):
    """Whether any was asked a while ago, and whether one has had no answer yet."""

    asked: bool
    unanswered: bool


def questions(netns: Path, zone: int) -> Questions:
    """Look for what was asked in this zone of a namespace.

    A kernel that does not tell is taken to say yes. Of a socket that asks again and again only the
    first answer is known.
    """
    # Dear to import, and needed by who captures DNS alone.
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    def ask() -> Questions:
        with NFCTSocket() as conntrack:
            found = [
                bool(entry.get_attr("CTA_STATUS") & _SEEN_REPLY)
                for entry in conntrack.dump()
                if entry.get_attr("CTA_ZONE") == zone
            ]
        return Questions(bool(found), not all(found))

    try:
        return within(netns, ask)
    except (NetlinkError, OSError):
        return Questions(True, True)
