// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// DNS by UDP, where an unconnected socket names the resolver with each query
// (BPF_CGROUP_UDP{4,6}_SENDMSG), and an answer must seem to come from the one that was asked
// (BPF_CGROUP_UDP{4,6}_RECVMSG). Connected sockets: connect.c.

// Answers 1 to let the query go on, 0 to refuse it. Sets *aim to where it must go elsewhere.
ALWAYS int decide_query(struct bpf_sock_addr *ctx, struct attempt *a, struct aim *aim)
{
	struct sock_state *state;
	struct pod *pod;
	enum rule rule;

	if (a->dst.port != DNS_PORT || ctx->protocol != IPPROTO_UDP)
		return 1;
	a->netns = bpf_get_netns_cookie(ctx);
	pod = pods.lookup(&a->netns);
	if (!pod || !(pod->flags & POD_DNS))
		return 1;
	a->udp = true;
	look_around(ctx, pod, a);
	rule = outbound_rule(pod, a);
	if (rule != RULE_OUTBOUND_DNS)
		return 1;
	*aim = take_aim(ctx, pod, rule, a);
	state = states.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state) {
		count(a->netns, REFUSED_NO_STATE);
		return 0;
	}
	// Of several resolvers that one socket asks at once the last is remembered.
	steer(state, a, aim);
	count_rule(a->netns, rule, STEERED_DNS);
	return 1;
}

ALWAYS int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct attempt a = {.dst = {.ip = mapped(ctx->user_ip4), .port = bpf_ntohs(ctx->user_port)},
			    .source = mapped(ctx->msg_src_ip4)};
	struct aim aim = {};
	int verdict;

	settle_unspecified(&a);
	verdict = decide_query(ctx, &a, &aim);
	if (aim.to.port) {
		ctx->user_ip4 = aim.to.ip.word[3];
		ctx->user_port = bpf_htons(aim.to.port);
		if (!is_any(&aim.source))
			ctx->msg_src_ip4 = aim.source.word[3];
	}
	return verdict;
}

ALWAYS int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct attempt a = {.dst = {.port = bpf_ntohs(ctx->user_port)}};
	struct aim aim = {};
	int verdict;

	COPY_WORDS(a.dst.ip.word, ctx->user_ip6);
	COPY_WORDS(a.source.word, ctx->msg_src_ip6);
	settle_unspecified(&a);
	verdict = decide_query(ctx, &a, &aim);
	if (aim.to.port) {
		COPY_WORDS(ctx->user_ip6, aim.to.ip.word);
		ctx->user_port = bpf_htons(aim.to.port);
		if (!is_any(&aim.source)) {
			COPY_WORDS(ctx->msg_src_ip6, aim.source.word);
		}
	}
	return verdict;
}

// The resolver, when this is an answer of the sidecar's to a captured query, else NULL.
ALWAYS struct endpoint *asked(struct bpf_sock_addr *ctx, const struct address *from, __u16 port)
{
	struct sock_state *state;

	if (ctx->protocol != IPPROTO_UDP || !ctx->sk)
		return NULL;
	state = states.sk_storage_get(ctx->sk, 0, 0);
	if (!state || !(state->flags & FLOW_STEERED) || state->flow.server_port != port ||
	    !same(&state->flow.server, from))
		return NULL;
	return &state->original;
}

ALWAYS int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct address from = mapped(ctx->user_ip4);
	struct endpoint *resolver = asked(ctx, &from, bpf_ntohs(ctx->user_port));

	if (resolver) {
		ctx->user_ip4 = resolver->ip.word[3];
		ctx->user_port = bpf_htons(resolver->port);
	}
	return 1;
}

ALWAYS int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct endpoint *resolver;
	struct address from;

	COPY_WORDS(from.word, ctx->user_ip6);
	resolver = asked(ctx, &from, bpf_ntohs(ctx->user_port));
	if (resolver) {
		COPY_WORDS(ctx->user_ip6, resolver->ip.word);
		ctx->user_port = bpf_htons(resolver->port);
	}
	return 1;
}

int redirector_sendmsg4(struct bpf_sock_addr *ctx)
{
	return sendmsg4(ctx);
}

int redirector_sendmsg6(struct bpf_sock_addr *ctx)
{
	return sendmsg6(ctx);
}

int redirector_recvmsg4(struct bpf_sock_addr *ctx)
{
	return recvmsg4(ctx);
}

int redirector_recvmsg6(struct bpf_sock_addr *ctx)
{
	return recvmsg6(ctx);
}
