// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// connect(): keep the original destination, aim at the sidecar (BPF_CGROUP_INET{4,6}_CONNECT).

// A direct connection whose other end may be on this node, and so may be short-circuited: the
// sidecar's to the application or to another pod.
ALWAYS bool is_near(enum rule rule, const struct attempt *a)
{
	return rule == RULE_OUTBOUND_PASSTHROUGH ||
	       (rule == RULE_OUTBOUND_PROXY_UID && (a->neighbour || is_loopback(&a->dst.ip)));
}

// Where a connection goes instead of its destination.
struct aim {
	struct endpoint to;    // port 0: to its destination
	struct address source; // that it must have there; all zero: what the kernel picks
};

// Multicast, or all of a link: no TCP connection goes there.
ALWAYS bool is_many(const struct address *a)
{
	__u32 high = bpf_ntohl(a->word[3]) >> 28;

	if (is_v4(a))
		return high == 0xe || a->word[3] == 0xffffffff;
	return bpf_ntohl(a->word[0]) >> 24 == 0xff;
}

// Where connect() answers ENETUNREACH, as it does without a route: 255.255.255.255 or ff02::1
// (tcp_v4_connect, tcp_v6_connect). A pod without an address of a family has no way out by it.
ALWAYS struct address nowhere(bool v4)
{
	struct address v6 = {{bpf_htonl(0xff020000), 0, 0, bpf_htonl(1)}};

	return v4 ? mapped(0xffffffff) : v6;
}

// Whether somebody listens for DNS on this address.
ALWAYS bool is_served(struct bpf_sock_addr *ctx, const struct address *ip, __u16 port, bool udp)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *listener;
	__u32 size;

	if (is_v4(ip)) {
		tuple.ipv4.saddr = tuple.ipv4.daddr = ip->word[3];
		tuple.ipv4.dport = bpf_htons(port);
		size = sizeof(tuple.ipv4);
	} else {
		COPY_WORDS(tuple.ipv6.saddr, ip->word);
		COPY_WORDS(tuple.ipv6.daddr, ip->word);
		tuple.ipv6.dport = bpf_htons(port);
		size = sizeof(tuple.ipv6);
	}
	listener = udp ? bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0)
		       : bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (listener)
		bpf_sk_release(listener);
	return listener;
}

ALWAYS void aim_at_dns(struct bpf_sock_addr *ctx, const struct pod *pod, const struct attempt *a,
		       struct aim *aim)
{
	bool v4 = is_v4(&a->dst.ip);
	struct address loopback = loopback_of(v4);
	struct address own = v4 ? pod->ip4 : pod->ip6;
	bool inside = is_loopback(&a->dst.ip) || is_any(&own);

	aim->to.port = pod->dns_port;
	if (!inside && is_served(ctx, &own, pod->dns_port, a->udp)) {
		aim->to.ip = own;
		return;
	}
	// As REDIRECT has it: many a sidecar answers DNS on loopback only. What would have left the
	// pod keeps the source address that it would have had.
	aim->to.ip = loopback;
	if (!inside && is_unbound(&a->source))
		aim->source = own;
}

// Where IPv4 connections to a destination are taken by the sidecar. Were it the pod's own address
// for all of them, each would need a source port of its own, those in TIME_WAIT included, which the
// kernel uses again on loopback only (tcp_tw_reuse).
ALWAYS struct address loopback_for(const struct endpoint *to)
{
	__u64 hash = stir(to->port, to->ip.word[3]);

	return mapped(bpf_htonl(STEERED_LOOPBACK << 16 | hash >> 48));
}

// Whether a connection that would have left the pod may aim at loopback with a source address of
// the pod's own. What is bound to an interface does not get there, and the kernel gives a socket
// that has a port no address any more.
ALWAYS bool may_use_loopback(struct bpf_sock_addr *ctx, const struct attempt *a)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk || a->device || is_loopback(&a->source))
		return false;
	return !is_unbound(&a->source) || !sk->src_port;
}

ALWAYS struct aim take_aim(struct bpf_sock_addr *ctx, const struct pod *pod, enum rule rule,
			   const struct attempt *a)
{
	struct aim aim = {};

	switch (rule) {
	case RULE_OUTBOUND_DNS:
		aim_at_dns(ctx, pod, a, &aim);
		return aim;
	case RULE_OUTBOUND_PROXY_SELF:
		aim.to.port = pod->inbound_port;
		break;
	case RULE_OUTBOUND_INCLUDED_PORT:
	case RULE_OUTBOUND_INCLUDED_CIDR:
		aim.to.port = pod->outbound_port;
		break;
	default:
		return aim;
	}
	// The sidecar sees the client that it would see behind iptables REDIRECT: the kernel picks
	// that source address for one of the pod's own, and for loopback if the connection asked
	// for that; else it is told to.
	aim.to.ip = is_v4(&a->dst.ip) ? pod->ip4 : pod->ip6;
	if (a->own)
		aim.to.ip = a->dst.ip;
	else if (is_loopback(&a->dst.ip))
		aim.to.ip = loopback_of(is_v4(&a->dst.ip));
	else if (is_any(&aim.to.ip) || is_many(&a->dst.ip))
		aim.to.ip = nowhere(is_v4(&a->dst.ip));
	else if (is_v4(&a->dst.ip) && may_use_loopback(ctx, a)) {
		if (is_unbound(&a->source))
			aim.source = aim.to.ip;
		aim.to.ip = loopback_for(&a->dst);
	}
	return aim;
}

ALWAYS __u32 steered_counter(enum rule rule)
{
	switch (rule) {
	case RULE_OUTBOUND_DNS:
		return STEERED_DNS;
	case RULE_OUTBOUND_PROXY_SELF:
		return STEERED_SELF;
	default:
		return STEERED_OUTBOUND;
	}
}

// Keeps what the sidecar, the application and recvmsg() will ask for.
ALWAYS void steer(struct sock_state *state, const struct attempt *a, const struct aim *aim)
{
	state->flags |= FLOW_STEERED;
	state->original = a->dst;
	state->flow.server = aim->to.ip;
	state->flow.server_port = aim->to.port;
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

// Whether the socket was disconnected (connect() with AF_UNSPEC) while it was in the sockhash. What
// it had not read is in its queue still.
ALWAYS bool connects_again(const struct sock_state *state)
{
	return state->flags & (FLOW_ACCELERATE | FLOW_AGAIN) && !(state->flags & FLOW_LEFT);
}

// Nothing is kept of an earlier connect() of the socket, which may have been steered.
ALWAYS void forget(struct bpf_sock_addr *ctx)
{
	struct sock_state *state = states.sk_storage_get(ctx->sk, 0, 0);

	if (!state)
		return;
	if (!connects_again(state) || ctx->protocol != IPPROTO_TCP) {
		states.sk_storage_delete(ctx->sk);
		return;
	}
	__builtin_memset(state, 0, sizeof(*state));
	state->flags = FLOW_AGAIN;
}

// Answers 1 to let the connect go on, 0 to refuse it. Sets *aim to where it must go elsewhere.
ALWAYS int decide_connect(struct bpf_sock_addr *ctx, struct attempt *a, struct aim *aim)
{
	struct sock_state *state;
	struct pod *pod;
	enum rule rule;
	bool near = true, again;

	a->netns = bpf_get_netns_cookie(ctx);
	pod = pods.lookup(&a->netns);
	a->udp = ctx->protocol == IPPROTO_UDP;
	if (!pod || (a->udp ? !(pod->flags & POD_DNS) : ctx->protocol != IPPROTO_TCP))
		return 1;
	look_around(ctx, pod, a);
	rule = outbound_rule(pod, a);
	*aim = take_aim(ctx, pod, rule, a);
	if (!a->udp && is_many(&aim->to.ip)) {
		count_rule(a->netns, rule, COUNTERS);
		forget(ctx);
		return 1;
	}
	if (!aim->to.port) {
		if (!a->udp)
			count_rule(a->netns, rule, COUNTERS);
		near = !a->udp && pod->flags & POD_ACCELERATE && is_near(rule, a);
		if (!near && (a->udp || !followed())) {
			forget(ctx);
			return 1;
		}
	}

	state = states.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state) {
		// Not accelerated is fine; steered without an original destination is not: it
		// would slip past the policy.
		if (!aim->to.port)
			return 1;
		count(a->netns, REFUSED_NO_STATE);
		tell_unkept(a, rule);
		return 0;
	}
	again = connects_again(state);
	__builtin_memset(state, 0, sizeof(*state));
	state->flags = again ? FLOW_AGAIN : 0;
	state->rule = rule;
	current_process(&state->process);
	if (!near)
		state->flags |= FLOW_WATCHED;
	else if (pod->flags & POD_ACCELERATE)
		state->flags |= FLOW_ACCELERATE;
	if (!aim->to.port)
		return 1;
	steer(state, a, aim);
	count_rule(a->netns, rule, steered_counter(rule));
	return 1;
}

ALWAYS int connect4(struct bpf_sock_addr *ctx)
{
	struct attempt a = {
	    .dst = {.ip = mapped(ctx->user_ip4), .port = bpf_ntohs(ctx->user_port)}};
	struct sockaddr_in source = {.sin_family = AF_INET};
	struct bpf_sock *sk = ctx->sk;
	struct aim aim = {};
	int verdict;

	if (sk)
		a.source = mapped(sk->src_ip4);
	settle_unspecified(&a);
	verdict = decide_connect(ctx, &a, &aim);
	if (!aim.to.port)
		return verdict;
	if (!is_any(&aim.source)) {
		// Refused when the socket has a port already: the kernel picks loopback then.
		source.sin_addr.s_addr = aim.source.word[3];
		bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source));
	}
	ctx->user_ip4 = aim.to.ip.word[3];
	ctx->user_port = bpf_htons(aim.to.port);
	return verdict;
}

ALWAYS int connect6(struct bpf_sock_addr *ctx)
{
	struct attempt a = {.dst = {.port = bpf_ntohs(ctx->user_port)}};
	struct sockaddr_in6 source = {.sin6_family = AF_INET6};
	struct bpf_sock *sk = ctx->sk;
	struct aim aim = {};
	int verdict;

	COPY_WORDS(a.dst.ip.word, ctx->user_ip6);
	if (sk) {
		COPY_WORDS(a.source.word, sk->src_ip6);
	}
	settle_unspecified(&a);
	verdict = decide_connect(ctx, &a, &aim);
	if (!aim.to.port)
		return verdict;
	if (!is_any(&aim.source)) {
		COPY_WORDS(source.sin6_addr.s6_addr32, aim.source.word);
		bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source));
	}
	COPY_WORDS(ctx->user_ip6, aim.to.ip.word);
	ctx->user_port = bpf_htons(aim.to.port);
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
