"""Flows whose connection has ended without our programs being told.

A foreign sockops program that replaces a socket's callback flags (bpf_sock_ops_cb_flags_set) takes
the word of its close away from ours; the flow would stay until the pod is taken off.
"""

import time
from collections.abc import Iterable

from redirector.datapath.layout import FlowKey
from redirector.datapath.maps import Maps
from redirector.errors import InputError
from redirector.model import Pod
from redirector.network import open_ends

#: A connection that is younger is left alone.
SETTLED_NS = 30 * 10**9


def forget_closed(maps: Maps, pods: Iterable[Pod], settled_ns: int = SETTLED_NS) -> int:
    """Delete the flows of these pods that no socket has any more; return how many.

    The bytes that such a connection had redirected are then in no counter.
    """
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - settled_ns
    old = maps.opened_before(before)
    forgotten = 0
    for pod in pods:
        if pod.netns_cookie not in old:
            continue
        try:
            living = open_ends(pod.netns)
        except InputError:  # the namespace is gone; `unenroll` deletes its flows
            continue
        for raw, flow_id in old[pod.netns_cookie]:
            if FlowKey.from_buffer_copy(raw).ends not in living:
                forgotten += maps.forget_flow(raw, flow_id)
    return forgotten
