// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// A SYN for the pod (BPF_SK_LOOKUP): from outside it goes to the sidecar's inbound listener. No
// address is rewritten, so the accepted socket's local address is the original destination.

ALWAYS enum rule inbound_rule(struct bpf_sk_lookup *ctx, const struct pod *pod, __u64 netns)
{
	__u16 port = ctx->local_port;

#if HAS_INGRESS_IFINDEX
	if (pod->flags & POD_INTERFACES &&
	    is_member(netns, ctx->ingress_ifindex, INTERFACE_EXCLUDE))
		return RULE_INBOUND_EXCLUDED_INTERFACE;
#endif
	if (port == TUNNEL_PORT)
		return RULE_INBOUND_TUNNEL_PORT;
	if (pod->flags & POD_INBOUND_LIST)
		return is_member(netns, port, INBOUND_PORT_INCLUDE) ? RULE_INBOUND_INCLUDED_PORT
								    : RULE_INBOUND_NOT_INCLUDED;
	if (pod->flags & POD_HAS_PORTS && is_member(netns, port, INBOUND_PORT_EXCLUDE))
		return RULE_INBOUND_EXCLUDED_PORT;
	return RULE_INBOUND_INCLUDED_PORT;
}

ALWAYS bool assign(struct bpf_sk_lookup *ctx, __u64 netns, __u32 family)
{
	struct listener_key key = {.netns = netns, .family = family};
	struct bpf_sock *listener;
	long failed;

	// Any of them will do: the kernel chooses among those that share the port.
#pragma unroll
	for (int slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot;
		listener = listeners.lookup(&key);
		if (!listener)
			continue;
		failed = bpf_sk_assign(ctx, listener, 0);
		bpf_sk_release(listener);
		return !failed;
	}
	return false;
}

// For who follows: the socket that will be accepted does not tell why it came.
ALWAYS void note_arrival(struct flow_key *key, __u32 rule)
{
	if (followed())
		arrivals.update(key, &rule);
}

ALWAYS void refuse_from_outside(const struct flow_key *key, __u64 netns)
{
	struct event event = {
	    .netns = netns,
	    .client = {.ip = key->client, .port = key->client_port},
	    .server = {.ip = key->server, .port = key->server_port},
	    .reason = REFUSED_NO_LISTENER,
	};

	count(netns, REFUSED_NO_LISTENER);
	tell_refused(&event);
}

ALWAYS int from_outside(struct bpf_sk_lookup *ctx, const struct pod *pod, __u64 netns,
			struct flow_key *key)
{
	enum rule rule = inbound_rule(ctx, pod, netns);

	note_arrival(key, rule);
	if (rule != RULE_INBOUND_INCLUDED_PORT) {
		count_rule(netns, rule, COUNTERS);
		return SK_PASS;
	}
	// An IPv6 socket that is not IPV6_V6ONLY serves IPv4 too; the kernel refuses the others.
	if ((ctx->family == AF_INET && assign(ctx, netns, AF_INET)) ||
	    assign(ctx, netns, AF_INET6)) {
		count_rule(netns, rule, STEERED_INBOUND);
		return SK_PASS;
	}
	// As with REDIRECT to a closed port: refused, never past the sidecar.
	refuse_from_outside(key, netns);
	return SK_DROP;
}

// The netns cookie of the pod that this copy of the program is for; no helper tells it here. The
// mark is replaced before a copy is loaded (redirector/datapath/instructions.py).
ALWAYS __u64 own_netns(void)
{
	__u64 netns;

	asm volatile("%0 = %1 ll" : "=r"(netns) : "i"(NETNS_MARK));
	return netns;
}

// A loopback address is not the pod's alone: a neighbour reaches ::6, which every enrolled pod has,
// and 127/8 where route_localnet is set. Where the kernel does not tell the interface, the client's
// address tells.
ALWAYS bool stays_inside(struct bpf_sk_lookup *ctx, const struct address *server)
{
#if HAS_INGRESS_IFINDEX
	return is_loopback(server) && ctx->ingress_ifindex == LOOPBACK_INDEX;
#else
	return false;
#endif
}

ALWAYS int inbound(struct bpf_sk_lookup *ctx)
{
	__u64 netns = own_netns();
	struct flow_key key = {};
	struct flow *flow;
	struct pod *pod;
	bool sidecars;
	__s64 *open;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	if (ctx->family == AF_INET) {
		key.server = mapped(ctx->local_ip4);
		key.client = mapped(ctx->remote_ip4);
	} else {
		COPY_WORDS(key.server.word, ctx->local_ip6);
		COPY_WORDS(key.client.word, ctx->remote_ip6);
	}
	if (stays_inside(ctx, &key.server) && !is_steered_loopback(&key.server))
		return SK_PASS;
	pod = pods.lookup(&netns);
	if (!pod)
		return SK_PASS;
	sidecars = ctx->local_port == pod->outbound_port || ctx->local_port == pod->inbound_port;
	key.server_port = ctx->local_port;
	key.client_port = bpf_ntohs(ctx->remote_port);
	scope(&key, netns);
	if (sidecars) {
		// Steered at connect(), from whatever address: it has brought its original
		// destination.
		flow = flows.lookup(&key);
		if (flow && flow->client_netns == netns && flow->flags & FLOW_STEERED)
			return SK_PASS;
	}
	// The kernel drops packets from outside that claim one of our own addresses as source.
	if (!stays_inside(ctx, &key.server) && !is_loopback(&key.client) &&
	    !same(&key.client, &key.server) && !is_own(pod, &key.client, netns))
		return from_outside(ctx, pod, netns, &key);
	// A sidecar that is told of no original destination leads it nowhere.
	if (!sidecars || pod->flags & POD_TAKEOVER || is_plain_loopback(&key.server))
		return SK_PASS;
	// Who dialled tells of it (sockops.c), and knows the process.
	open = shares.lookup(&netns);
	count(netns, has_room(open, true) ? REFUSED_NO_FLOW : REFUSED_NO_SHARE);
	return SK_DROP;
}

int redirector_inbound(struct bpf_sk_lookup *ctx)
{
	return inbound(ctx);
}
