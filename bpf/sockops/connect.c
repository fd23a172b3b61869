// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// connect(): keep the original destination, aim at the sidecar (BPF_CGROUP_INET{4,6}_CONNECT).
// The order of the rules is that of redirector/steering.py.

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

// What a connection is, as far as the rules ask.
struct attempt {
	struct endpoint dst;
	struct address source; // that it was bound to
	__u64 netns;
	struct ids ids;
	bool own;	// to one of the pod's own addresses
	bool neighbour; // to an enrolled pod's address, its own included
};

ALWAYS bool is_self_call(const struct pod *pod, const struct attempt *a)
{
	// Only the first of several proxies answers for the pod.
	return pod->proxy_uids && a->ids.uid == pod->proxy_uid[0] && !is_host(pod, &a->dst.ip) &&
	       (a->own || is_loopback(&a->dst.ip));
}

ALWAYS bool is_captured_group(const struct pod *pod, const struct attempt *a, enum rule *rule)
{
	*rule = RULE_OUTBOUND_EXCLUDED_GROUP;
	if (pod->flags & POD_GROUP_EXCLUDED && is_member(a->netns, a->ids.gid, GROUP_EXCLUDE))
		return false;
	*rule = RULE_OUTBOUND_GROUP_NOT_INCLUDED;
	return !(pod->flags & POD_GROUP_LIST) || is_member(a->netns, a->ids.gid, GROUP_INCLUDE);
}

ALWAYS enum rule application_rule(const struct pod *pod, struct attempt *a)
{
	struct endpoint *dst = &a->dst;
	bool cidrs = pod->flags & POD_HAS_CIDRS;

	if (a->own || is_host(pod, &dst->ip) || is_local(&dst->ip, 6))
		return RULE_OUTBOUND_APP_LOCAL;
	// Loopback is captured only where a range inside loopback was named.
	if (is_v4_loopback(&dst->ip) &&
	    !(cidrs && cidr_listed(a->netns, &dst->ip, CIDR_INCLUDE) == CIDR_IN_LOOPBACK))
		return RULE_OUTBOUND_APP_LOCAL;
	if (cidrs && cidr_listed(a->netns, &dst->ip, CIDR_EXCLUDE))
		return RULE_OUTBOUND_EXCLUDED_CIDR;
	if (pod->flags & POD_HAS_PORTS && is_member(a->netns, dst->port, OUTBOUND_PORT_INCLUDE))
		return RULE_OUTBOUND_INCLUDED_PORT;
	if (pod->flags & (is_v4(&dst->ip) ? POD_INCLUDE_ALL_V4 : POD_INCLUDE_ALL_V6))
		return RULE_OUTBOUND_INCLUDED_CIDR;
	if (cidrs && cidr_listed(a->netns, &dst->ip, CIDR_INCLUDE))
		return RULE_OUTBOUND_INCLUDED_CIDR;
	return RULE_OUTBOUND_NOT_INCLUDED;
}

ALWAYS enum rule outbound_rule(const struct pod *pod, struct attempt *a)
{
	enum rule rule;

	if (pod->flags & POD_HAS_PORTS && is_member(a->netns, a->dst.port, OUTBOUND_PORT_EXCLUDE))
		return RULE_OUTBOUND_EXCLUDED_PORT;
	// The sidecar's own passthrough to the application.
	if (is_local(&a->source, 6) && (a->own || is_loopback(&a->dst.ip)))
		return RULE_OUTBOUND_PASSTHROUGH;
	if (is_self_call(pod, a))
		return a->dst.port == TUNNEL_PORT ? RULE_OUTBOUND_PROXY_TUNNEL
						  : RULE_OUTBOUND_PROXY_SELF;
	if (is_proxy_uid(pod, a->ids.uid))
		return RULE_OUTBOUND_PROXY_UID;
	if (is_proxy_gid(pod, a->ids.gid))
		return RULE_OUTBOUND_PROXY_GID;
	if (!is_captured_group(pod, a, &rule))
		return rule;
	return application_rule(pod, a);
}

// A direct connection whose other end may be on this node, and so may be short-circuited: the
// sidecar's to the application or to another pod.
ALWAYS bool is_near(enum rule rule, const struct attempt *a)
{
	return rule == RULE_OUTBOUND_PASSTHROUGH ||
	       (rule == RULE_OUTBOUND_PROXY_UID && (a->neighbour || is_loopback(&a->dst.ip)));
}

// Sets *to where a connection must go instead; leaves it when it is direct.
ALWAYS void aim(const struct pod *pod, enum rule rule, const struct attempt *a, struct endpoint *to)
{
	switch (rule) {
	case RULE_OUTBOUND_PROXY_SELF:
		to->port = pod->inbound_port;
		break;
	case RULE_OUTBOUND_INCLUDED_PORT:
	case RULE_OUTBOUND_INCLUDED_CIDR:
		to->port = pod->outbound_port;
		break;
	default:
		return;
	}
	// The pod's own address, not loopback: the kernel then picks the source address that
	// iptables REDIRECT would have left, and the sidecar sees the same client.
	to->ip = is_v4(&a->dst.ip) ? pod->ip4 : pod->ip6;
}

ALWAYS void tell_unkept(const struct attempt *a, enum rule rule)
{
	struct event event = {
	    .netns = a->netns,
	    .client = {.ip = a->source},
	    .server = a->dst,
	    .rule = rule,
	    .reason = REFUSED_NO_STATE,
	};

	current_process(&event.process);
	tell_refused(&event);
}

// Answers 1 to let the connect go on, 0 to refuse it. Sets *to where it must go elsewhere.
ALWAYS int decide_connect(struct bpf_sock_addr *ctx, struct attempt *a, struct endpoint *to)
{
	struct sock_state *state;
	struct pod *pod;
	enum rule rule;
	__u64 *owner;
	bool near = true;

	a->netns = bpf_get_netns_cookie(ctx);
	pod = pods.lookup(&a->netns);
	if (!pod || ctx->protocol != IPPROTO_TCP)
		return 1;
	a->ids = current_ids();
	owner = pods_by_address.lookup(&a->dst.ip);
	a->neighbour = owner;
	a->own = owner && *owner == a->netns;
	rule = outbound_rule(pod, a);
	aim(pod, rule, a, to);
	if (!to->port) {
		count_rule(a->netns, rule, COUNTERS);
		near = pod->flags & POD_ACCELERATE && is_near(rule, a);
		if (!near && !followed()) {
			// An earlier connect() of this socket, which failed, may have been steered.
			states.sk_storage_delete(ctx->sk);
			return 1;
		}
	}

	state = states.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state) {
		// Not accelerated is fine; steered without an original destination is not: it
		// would slip past the policy.
		if (!to->port)
			return 1;
		count(a->netns, REFUSED_NO_STATE);
		tell_unkept(a, rule);
		return 0;
	}
	__builtin_memset(state, 0, sizeof(*state));
	state->rule = rule;
	current_process(&state->process);
	if (!near)
		state->flags |= FLOW_WATCHED;
	else if (pod->flags & POD_ACCELERATE)
		state->flags |= FLOW_ACCELERATE;
	if (!to->port)
		return 1;
	state->flags |= FLOW_STEERED;
	state->original = a->dst;
	count_rule(a->netns, rule,
		   rule == RULE_OUTBOUND_PROXY_SELF ? STEERED_SELF : STEERED_OUTBOUND);
	return 1;
}

ALWAYS int connect4(struct bpf_sock_addr *ctx)
{
	struct attempt a = {
	    .dst = {.ip = mapped(ctx->user_ip4), .port = bpf_ntohs(ctx->user_port)}};
	struct bpf_sock *sk = ctx->sk;
	struct endpoint to = {};
	int verdict;

	// connect() to 0.0.0.0 means localhost (ip_route_connect).
	if (!ctx->user_ip4)
		a.dst.ip.word[3] = bpf_htonl(0x7f000001);
	if (sk)
		a.source = mapped(sk->src_ip4);
	verdict = decide_connect(ctx, &a, &to);
	if (to.port) {
		ctx->user_ip4 = to.ip.word[3];
		ctx->user_port = bpf_htons(to.port);
	}
	return verdict;
}

ALWAYS int connect6(struct bpf_sock_addr *ctx)
{
	struct attempt a = {.dst = {.port = bpf_ntohs(ctx->user_port)}};
	struct bpf_sock *sk = ctx->sk;
	struct endpoint to = {};
	int verdict;

	COPY_WORDS(a.dst.ip.word, ctx->user_ip6);
	// connect() to :: means loopback (ipv6: tcp_v6_connect).
	if (is_any(&a.dst.ip))
		a.dst.ip.word[3] = bpf_htonl(1);
	if (sk) {
		COPY_WORDS(a.source.word, sk->src_ip6);
	}
	verdict = decide_connect(ctx, &a, &to);
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
