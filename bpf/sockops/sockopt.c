// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What sockets are told: SO_ORIGINAL_DST for the sidecar (BPF_CGROUP_GETSOCKOPT), the peer's name
// for the application (BPF_CGROUP_INET{4,6}_GETPEERNAME).

#ifndef SO_ORIGINAL_DST
#define SO_ORIGINAL_DST 80 // also IP6T_SO_ORIGINAL_DST; linux/netfilter_ipv4.h
#endif
#define SOL_IP_LEVEL 0
#define SOL_IPV6_LEVEL 41

// A connection that sk_lookup gave to the sidecar: its local address is the original destination.
ALWAYS bool local_is_original(struct bpf_sockopt *ctx, struct endpoint *original)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = pods.lookup(&netns);
	struct bpf_sock *sk = ctx->sk;

	if (!pod || !sk || !is_proxy_uid(pod, bpf_get_current_uid_gid()))
		return false;
	original->port = sk->src_port;
	if (sk->family == AF_INET) {
		original->ip = mapped(sk->src_ip4);
		// Clang would join the branches by arithmetic on sk, which the verifier refuses.
		asm volatile("" ::: "memory");
		return true;
	}
	COPY_WORDS(original->ip.word, sk->src_ip6);
	return true;
}

ALWAYS void answer4(struct bpf_sockopt *ctx, const struct endpoint *original)
{
	struct sockaddr_in *out = ctx->optval;

	if ((void *)(out + 1) > ctx->optval_end)
		return;
	__builtin_memset(out, 0, sizeof(*out));
	out->sin_family = AF_INET;
	out->sin_port = bpf_htons(original->port);
	out->sin_addr.s_addr = original->ip.word[3];
	ctx->optlen = sizeof(*out);
	// Clang would merge the two stores into one that the verifier refuses.
	asm volatile("" ::: "memory");
	ctx->retval = 0;
}

ALWAYS void answer6(struct bpf_sockopt *ctx, const struct endpoint *original)
{
	struct sockaddr_in6 *out = ctx->optval;

	if ((void *)(out + 1) > ctx->optval_end)
		return;
	__builtin_memset(out, 0, sizeof(*out));
	out->sin6_family = AF_INET6;
	out->sin6_port = bpf_htons(original->port);
	COPY_WORDS(out->sin6_addr.s6_addr32, original->ip.word);
	ctx->optlen = sizeof(*out);
	asm volatile("" ::: "memory");
	ctx->retval = 0;
}

ALWAYS int getsockopt(struct bpf_sockopt *ctx)
{
	bool v4 = ctx->level == SOL_IP_LEVEL;
	struct endpoint original = {};
	struct sock_state *state;
	struct flow *flow;

	if (ctx->optname != SO_ORIGINAL_DST || (!v4 && ctx->level != SOL_IPV6_LEVEL) || !ctx->sk)
		return 1;
	state = states.sk_storage_get(ctx->sk, 0, 0);
	if (state && state->side == SERVER && state->flags & FLOW_STEERED) {
		original = state->original;
		flow = flows.lookup(&state->flow);
		if (flow)
			flow->flags |= FLOW_ANSWERED;
	} else if (ctx->retval == 0 || !local_is_original(ctx, &original)) {
		// Conntrack has answered (iptables), or it is none of our connections.
		return 1;
	}
	if (v4 && is_v4(&original.ip))
		answer4(ctx, &original);
	else if (!v4 && !is_v4(&original.ip))
		answer6(ctx, &original);
	return 1;
}

ALWAYS struct sock_state *steered_client(struct bpf_sock_addr *ctx)
{
	struct sock_state *state;

	if (!ctx->sk)
		return NULL;
	state = states.sk_storage_get(ctx->sk, 0, 0);
	if (!state || state->side != CLIENT || !(state->flags & FLOW_STEERED))
		return NULL;
	return state;
}

ALWAYS int getpeername4(struct bpf_sock_addr *ctx)
{
	struct sock_state *state = steered_client(ctx);

	if (state) {
		ctx->user_ip4 = state->original.ip.word[3];
		ctx->user_port = bpf_htons(state->original.port);
	}
	return 1;
}

ALWAYS int getpeername6(struct bpf_sock_addr *ctx)
{
	struct sock_state *state = steered_client(ctx);

	if (state) {
		COPY_WORDS(ctx->user_ip6, state->original.ip.word);
		ctx->user_port = bpf_htons(state->original.port);
	}
	return 1;
}

int redirector_getsockopt(struct bpf_sockopt *ctx)
{
	return getsockopt(ctx);
}

int redirector_getpeername4(struct bpf_sock_addr *ctx)
{
	return getpeername4(ctx);
}

int redirector_getpeername6(struct bpf_sock_addr *ctx)
{
	return getpeername6(ctx);
}
