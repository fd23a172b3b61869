"""Where the programs are attached; a hook has its program's name."""

from redirector.datapath.libbpf import AttachType

#: Hooks of a pod, in the order in which they are attached: who answers before who asks, and the
#: connect hooks last, so that no connection is steered before all of its way stands.
CGROUP_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("getsockopt", AttachType.CGROUP_GETSOCKOPT),
    ("setsockopt", AttachType.CGROUP_SETSOCKOPT),
    ("getpeername4", AttachType.CGROUP_INET4_GETPEERNAME),
    ("getpeername6", AttachType.CGROUP_INET6_GETPEERNAME),
    ("sockops", AttachType.CGROUP_SOCK_OPS),
)
#: Of pods whose connections are short-circuited, on kernels where it works and is needed.
SPLICE_HOOK = ("splice", AttachType.LSM_CGROUP)
PERMISSION_HOOKS = (SPLICE_HOOK, ("zerocopy", AttachType.LSM_CGROUP))
INBOUND_HOOK = ("inbound", AttachType.SK_LOOKUP)
CONNECT_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("connect4", AttachType.CGROUP_INET4_CONNECT),
    ("connect6", AttachType.CGROUP_INET6_CONNECT),
)
#: Its program is made for each pod, from the code that is pinned under the hook's name.
PER_POD = INBOUND_HOOK[0]
#: What decides about new connections: at any moment of one generation only.
DECIDING_HOOKS = (INBOUND_HOOK, *CONNECT_HOOKS)
ALL_HOOKS = (*CGROUP_HOOKS, *DECIDING_HOOKS)
#: Of pods whose DNS is captured, beside those: they answer, and decide.
DNS_ANSWER_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("recvmsg4", AttachType.CGROUP_UDP4_RECVMSG),
    ("recvmsg6", AttachType.CGROUP_UDP6_RECVMSG),
)
DNS_QUERY_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("sendmsg4", AttachType.CGROUP_UDP4_SENDMSG),
    ("sendmsg6", AttachType.CGROUP_UDP6_SENDMSG),
)
#: Those on the sockhash itself, of all pods.
SOCKHASH_HOOKS: tuple[tuple[str, AttachType], ...] = (
    ("redirect", AttachType.SK_MSG_VERDICT),
    ("arrive", AttachType.SK_SKB_STREAM_VERDICT),
)
#: What is pinned of each build, by name; on some kernels the permission hooks' programs beside it.
#: `forget` is attached nowhere (forgetting.py).
PINNED = frozenset(
    hook for hook, _ in (*ALL_HOOKS, *DNS_ANSWER_HOOKS, *DNS_QUERY_HOOKS, *SOCKHASH_HOOKS)
) | {"forget"}
