// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Which rule decides a connection that a process of the pod opens. The order is that of
// OUTBOUND_RULES, redirector/steering.py; those of inbound connections are in inbound.c.

// What a connection is, as far as the rules ask.
struct attempt {
	struct endpoint dst;
	struct address source; // that it was bound to
	__u64 netns;
	struct ids ids;
	__u32 device;	// that the socket is bound to, by index
	bool own;	// to one of the pod's own addresses
	bool neighbour; // to an enrolled pod's address, its own included
	bool udp;
};

// What the caller of a hook does not say: who connects, and whose address it is.
ALWAYS void look_around(struct bpf_sock_addr *ctx, const struct pod *pod, struct attempt *a)
{
	struct bpf_sock *sk = ctx->sk;
	__u64 *owner = pods_by_address.lookup(&a->dst.ip);

	a->ids = owner_ids(ctx);
	a->neighbour = owner;
	a->own = is_owned(pod, owner, &a->dst.ip, a->netns);
	if (sk)
		a->device = sk->bound_dev_if;
}

ALWAYS struct address loopback_of(bool v4)
{
	struct address v6 = {{0, 0, 0, bpf_htonl(1)}};

	return v4 ? mapped(bpf_htonl(0x7f000001)) : v6;
}

ALWAYS bool is_unbound(const struct address *source)
{
	return is_any(source) || (is_v4(source) && !source->word[3]);
}

// Where the unspecified address leads: to localhost (tcp_v6_connect) or, in IPv4, to the address
// that the socket is bound to, if any (ip_route_output_key_hash_rcu).
ALWAYS void settle_unspecified(struct attempt *a)
{
	if (is_any(&a->dst.ip))
		a->dst.ip = loopback_of(is_v4(&a->source));
	else if (is_v4(&a->dst.ip) && !a->dst.ip.word[3])
		a->dst.ip = is_v4(&a->source) && a->source.word[3] ? a->source : loopback_of(true);
}

#define LOOPBACK_INDEX 1

ALWAYS bool leaves_by_excluded(struct attempt *a)
{
	if (a->own || is_loopback(&a->dst.ip))
		return is_member(a->netns, LOOPBACK_INDEX, INTERFACE_EXCLUDE);
	if (a->device)
		return is_member(a->netns, a->device, INTERFACE_EXCLUDE);
	// No helper of these hooks asks the kernel's own table.
	return cidr_listed(a->netns, &a->dst.ip, CIDR_ROUTE) == CIDR_BY_EXCLUDED;
}

ALWAYS bool is_self_call(const struct pod *pod, const struct attempt *a)
{
	// What it asks of a resolver is never sent through the sidecar again.
	if (a->udp || (pod->flags & POD_DNS && a->dst.port == DNS_PORT))
		return false;
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

ALWAYS bool is_query(const struct pod *pod, struct attempt *a)
{
	return pod->flags & POD_DNS && a->dst.port == DNS_PORT &&
	       (pod->flags & POD_DNS_ANY || cidr_listed(a->netns, &a->dst.ip, CIDR_RESOLVER));
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

	if (pod->flags & POD_INTERFACES && leaves_by_excluded(a))
		return RULE_OUTBOUND_EXCLUDED_INTERFACE;
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
	if (is_query(pod, a))
		return RULE_OUTBOUND_DNS;
	if (a->udp)
		return RULE_OUTBOUND_NOT_TCP;
	return application_rule(pod, a);
}
