// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// connect(): keep the original destination, aim at the sidecar (BPF_CGROUP_INET{4,6}_CONNECT).
// The order of the rules is that of redirector/steering.py.

enum aim { AIM_DIRECT, AIM_NEAR, AIM_OUTBOUND, AIM_INBOUND };

// 0 when no range of the set holds the address, else enum cidr_value of the longest that does.
ALWAYS __u8 cidr_listed(__u64 netns, struct address *ip, __u32 set)
{
	struct cidr_key key = {
	    .prefixlen = 96 + 128,
	    .netns_low = netns,
	    .netns_high = netns >> 32,
	    .set = set,
	    .ip = *ip,
	};
	__u8 *value = cidrs.lookup(&key);

	return value ? *value : 0;
}

// The proxy's own connections. AIM_NEAR: direct, but the other end may be on this node.
ALWAYS enum aim aim_proxy(const struct pod *pod, __u32 uid, struct endpoint *dst, bool own,
			  bool neighbour)
{
	if (is_local(&dst->ip, 1))
		return AIM_NEAR;
	// It called its own pod. Only the first of several proxies answers for the pod.
	if ((own || is_v4_loopback(&dst->ip)) && uid == pod->proxy_uid[0])
		return dst->port == TUNNEL_PORT ? AIM_DIRECT : AIM_INBOUND;
	return neighbour ? AIM_NEAR : AIM_DIRECT;
}

ALWAYS enum aim aim_application(const struct pod *pod, __u64 netns, struct endpoint *dst, bool own)
{
	if (own || is_local(&dst->ip, 1))
		return AIM_DIRECT;
	// Loopback is captured only where a range inside loopback was named.
	if (is_v4_loopback(&dst->ip) &&
	    !(pod->flags & POD_HAS_CIDRS &&
	      cidr_listed(netns, &dst->ip, CIDR_INCLUDE) == CIDR_IN_LOOPBACK))
		return AIM_DIRECT;
	if (pod->flags & POD_HAS_CIDRS && cidr_listed(netns, &dst->ip, CIDR_EXCLUDE))
		return AIM_DIRECT;
	if (pod->flags & POD_HAS_PORTS && port_listed(netns, dst->port, OUTBOUND_INCLUDE))
		return AIM_OUTBOUND;
	if (pod->flags & (is_v4(&dst->ip) ? POD_INCLUDE_ALL_V4 : POD_INCLUDE_ALL_V6))
		return AIM_OUTBOUND;
	if (pod->flags & POD_HAS_CIDRS && cidr_listed(netns, &dst->ip, CIDR_INCLUDE))
		return AIM_OUTBOUND;
	return AIM_DIRECT;
}

ALWAYS enum aim take_aim(const struct pod *pod, __u64 netns, struct endpoint *dst,
			 const struct address *source)
{
	__u64 ids = bpf_get_current_uid_gid();
	__u64 *owner;
	bool own;

	if (pod->flags & POD_HAS_PORTS && port_listed(netns, dst->port, OUTBOUND_EXCLUDE))
		return AIM_DIRECT;
	owner = pods_by_address.lookup(&dst->ip);
	own = owner && *owner == netns;
	// The sidecar's own passthrough to the application.
	if (is_local(source, 6) && (own || is_loopback(&dst->ip)))
		return AIM_NEAR;
	if (is_proxy_uid(pod, ids))
		return aim_proxy(pod, ids, dst, own, owner);
	if (is_proxy_gid(pod, ids >> 32))
		return AIM_DIRECT;
	return aim_application(pod, netns, dst, own);
}

// Answers 1 to let the connect go on, 0 to refuse it. Sets *to where it must go elsewhere.
ALWAYS int decide_connect(struct bpf_sock_addr *ctx, struct endpoint *dst,
			  const struct address *source, struct endpoint *to)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = pods.lookup(&netns);
	struct sock_state *state;
	enum aim aim;

	if (!pod || ctx->protocol != IPPROTO_TCP)
		return 1;
	aim = take_aim(pod, netns, dst, source);
	if (aim == AIM_DIRECT)
		count(netns, DIRECT_OUTBOUND);
	if (aim == AIM_DIRECT || (aim == AIM_NEAR && !(pod->flags & POD_ACCELERATE))) {
		// An earlier connect() of this socket, which failed, may have been steered.
		states.sk_storage_delete(ctx->sk);
		return 1;
	}

	state = states.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state) {
		// Not accelerated is fine; steered without an original destination is not: it
		// would slip past the policy.
		if (aim == AIM_NEAR)
			return 1;
		count(netns, REFUSED_NO_STATE);
		return 0;
	}
	__builtin_memset(state, 0, sizeof(*state));
	if (pod->flags & POD_ACCELERATE)
		state->flags |= FLOW_ACCELERATE;
	if (aim == AIM_NEAR)
		return 1;

	state->flags |= FLOW_STEERED;
	state->original = *dst;
	// The pod's own address, not loopback: the kernel then picks the source address that
	// iptables REDIRECT would have left, and the sidecar sees the same client.
	to->ip = is_v4(&dst->ip) ? pod->ip4 : pod->ip6;
	if (is_any(&to->ip)) {
		to->ip.word[2] = is_v4(&dst->ip) ? bpf_htonl(0xffff) : 0;
		to->ip.word[3] = is_v4(&dst->ip) ? bpf_htonl(0x7f000001) : bpf_htonl(1);
	}
	to->port = aim == AIM_OUTBOUND ? pod->outbound_port : pod->inbound_port;
	count(netns, aim == AIM_OUTBOUND ? STEERED_OUTBOUND : STEERED_SELF);
	return 1;
}

ALWAYS int connect4(struct bpf_sock_addr *ctx)
{
	struct endpoint dst = {.ip = mapped(ctx->user_ip4), .port = bpf_ntohs(ctx->user_port)};
	struct bpf_sock *sk = ctx->sk;
	struct address source = {};
	struct endpoint to = {};
	int verdict;

	// connect() to 0.0.0.0 means localhost (ip_route_connect).
	if (!ctx->user_ip4)
		dst.ip.word[3] = bpf_htonl(0x7f000001);
	if (sk)
		source = mapped(sk->src_ip4);
	verdict = decide_connect(ctx, &dst, &source, &to);
	if (to.port) {
		ctx->user_ip4 = to.ip.word[3];
		ctx->user_port = bpf_htons(to.port);
	}
	return verdict;
}

ALWAYS int connect6(struct bpf_sock_addr *ctx)
{
	struct endpoint dst = {.port = bpf_ntohs(ctx->user_port)};
	struct bpf_sock *sk = ctx->sk;
	struct address source = {};
	struct endpoint to = {};
	int verdict;

	COPY_WORDS(dst.ip.word, ctx->user_ip6);
	// connect() to :: means loopback (ipv6: tcp_v6_connect).
	if (is_any(&dst.ip))
		dst.ip.word[3] = bpf_htonl(1);
	if (sk) {
		COPY_WORDS(source.word, sk->src_ip6);
	}
	verdict = decide_connect(ctx, &dst, &source, &to);
	if (to.port) {
		COPY_WORDS(ctx->user_ip6, to.ip.word);
		ctx->user_port = bpf_htons(to.port);
	}
	return verdict;
}

int redirector_connect4(struct bpf_sock_addr *ctx)
{
	return connect4(ctx);
}

int redirector_connect6(struct bpf_sock_addr *ctx)
{
	return connect6(ctx);
}
