// Programs such as others attach to a pod: each counts that it ran, and does a little of its own.

#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>
#include <uapi/linux/pkt_cls.h>

enum seen { CONNECT, GETSOCKOPT, SOCKOPS, RTT, LOOKUP, INGRESS, EGRESS, SEEN };

// A service as a load balancer at the socket knows it; network byte order.
struct service {
	__be32 ip;
	__be32 to_ip;
	__be32 denied_ip;
	__be16 port;
	__be16 to_port;
};

BPF_TABLE("array", __u32, __u64, seen, SEEN);
BPF_TABLE("array", __u32, struct service, services, 1);

static __always_inline void saw(__u32 what)
{
	__u64 *count = seen.lookup(&what);

	if (count)
		__sync_fetch_and_add(count, 1);
}

int other_connect4(struct bpf_sock_addr *ctx)
{
	__u32 zero = 0;
	struct service *service = services.lookup(&zero);

	saw(CONNECT);
	if (!service)
		return 1;
	if (ctx->user_ip4 == service->denied_ip)
		return 0;
	if (ctx->user_ip4 == service->ip && ctx->user_port == service->port) {
		ctx->user_ip4 = service->to_ip;
		ctx->user_port = service->to_port;
	}
	return 1;
}

// Answers an option that the kernel does not know.
int other_getsockopt(struct bpf_sockopt *ctx)
{
	char *out = ctx->optval;

	if (ctx->level != 0 || ctx->optname != 200)
		return 1;
	saw(GETSOCKOPT);
	if ((void *)(out + 1) > ctx->optval_end)
		return 1;
	*out = 42;
	ctx->optlen = 1;
	asm volatile("" ::: "memory");
	ctx->retval = 0;
	return 1;
}

int other_sockops(struct bpf_sock_ops *ops)
{
	if (ops->op == BPF_SOCK_OPS_RTT_CB)
		saw(RTT);
	if (ops->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		return 1;
	saw(SOCKOPS);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
	return 1;
}

// Leaves no callback to those who asked before it.
int other_deaf_sockops(struct bpf_sock_ops *ops)
{
	if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		bpf_sock_ops_cb_flags_set(ops, 0);
	return 1;
}

int other_sk_lookup(struct bpf_sk_lookup *ctx)
{
	saw(LOOKUP);
	return SK_PASS;
}

int other_ingress(struct __sk_buff *skb)
{
	saw(INGRESS);
	return TC_ACT_OK;
}

int other_egress(struct __sk_buff *skb)
{
	saw(EGRESS);
	return TC_ACT_OK;
}
