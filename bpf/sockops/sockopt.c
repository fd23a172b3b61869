// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What sockets are told: SO_ORIGINAL_DST for the sidecar (BPF_CGROUP_GETSOCKOPT), the peer's name
// for the application (BPF_CGROUP_INET{4,6}_GETPEERNAME). What sockets of the sockhash may not be
// told: options that do not go with it (BPF_CGROUP_SETSOCKOPT).

#ifndef SO_ORIGINAL_DST
#define SO_ORIGINAL_DST 80 // also IP6T_SO_ORIGINAL_DST; linux/netfilter_ipv4.h
#endif
#define SOL_IP_LEVEL 0
#define SOL_IPV6_LEVEL 41
#define SOL_TCP_LEVEL 6
#define TCP_ULP_OPTION 31     // linux/tcp.h
#define SO_ZEROCOPY_OPTION 60 // asm-generic/socket.h
#define UNKNOWN_OPTION 0x7fffffff
#define SOCKOPT_BUFFER 4096 // what the kernel shows of an option's value (kernel/bpf/cgroup.c)

// A connection that sk_lookup gave to the sidecar: its local address is the original destination.
ALWAYS bool local_is_original(struct bpf_sockopt *ctx, struct endpoint *original)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = pods.lookup(&netns);
	struct bpf_sock *sk = ctx->sk;

	if (!pod || !sk || !is_proxy_uid(pod, current_ids().uid))
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

// Whether this socket is in the sockhash now.
ALWAYS bool is_accelerated(struct bpf_sock *sk, __u64 *netns)
{
	struct sock_state *state = states.sk_storage_get(sk, 0, 0);
	struct flow *flow;

	if (!state || state->flags & FLOW_LEFT)
		return false;
	flow = flows.lookup(&state->flow);
	if (!flow || flow->id != state->id || !flow->socket[state->side & 1])
		return false;
	*netns = flow->client_netns;
	return true;
}

// TLS in the kernel would hand the sk_msg program plaintext; MSG_ZEROCOPY's word would never come.
// Both are answered as by a kernel that does not know the option, ENOPROTOOPT, by making it one
// that no kernel knows: programs do without. Setting an answer of our own needs Linux 5.18.
ALWAYS int setsockopt(struct bpf_sockopt *ctx)
{
	bool ktls = ctx->level == SOL_TCP_LEVEL && ctx->optname == TCP_ULP_OPTION;
	bool zerocopy = ctx->level == SOL_SOCKET && ctx->optname == SO_ZEROCOPY_OPTION;
	__u64 netns;

	if (ctx->optlen > SOCKOPT_BUFFER) {
		// Seen in part only. 0: the kernel takes the caller's, else older ones fail.
		ctx->optlen = 0;
		return 1;
	}
	if ((!ktls && !zerocopy) || !ctx->sk || !is_accelerated(ctx->sk, &netns))
		return 1;
	count(netns, ktls ? WITHHELD_KTLS : WITHHELD_ZEROCOPY);
	ctx->optname = UNKNOWN_OPTION;
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

int redirector_setsockopt(struct bpf_sockopt *ctx)
{
	return setsockopt(ctx);
}

int redirector_getpeername4(struct bpf_sock_addr *ctx)
{
	return getpeername4(ctx);
}

int redirector_getpeername6(struct bpf_sock_addr *ctx)
{
	return getpeername6(ctx);
}
