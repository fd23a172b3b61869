// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// send() on a socket of the sockhash (BPF_SK_MSG_VERDICT): to the peer's queue, or on by TCP.
//
// tcp_bpf_recvmsg() reads the redirected queue before TCP's own, so a direction that goes from TCP
// to the queue reorders bytes, and one that goes from the queue to TCP does not. Hence the rule:
// decide before the first byte; later at most once, and only from REDIRECT to PASS.

// Redirected bytes know no receive window. Past this many unread ones the direction goes to TCP,
// whose window then holds the sender back.
#define MAX_UNREAD (1 << 20)

ALWAYS int pass(struct sock_state *state, __u64 netns, __u32 reason)
{
	state->verdict = PASS;
	count(netns, reason);
	return SK_PASS;
}

#if RMEM_OFFSET
// What this socket itself has not read yet: redirected bytes are charged to sk_rmem_alloc
// (sk_psock_skb_ingress / bpf_tcp_ingress). RMEM_OFFSET comes from the running kernel's BTF.
ALWAYS __u32 own_unread(struct sk_msg_md *msg)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(msg->sk);
	__s32 bytes = 0;

	if (!tp || bpf_probe_read_kernel(&bytes, sizeof(bytes), (char *)tp + RMEM_OFFSET))
		return MAX_UNREAD;
	return bytes < 0 ? 0 : bytes;
}
#endif

ALWAYS int redirect(struct sk_msg_md *msg)
{
	struct sock_state *state;
	struct flow *flow;
	__u32 mine, theirs, unread;
	int found;

	if (!msg->sk)
		return SK_PASS;
	state = states.sk_storage_get(msg->sk, 0, 0);
	if (!state || state->verdict == PASS)
		return SK_PASS;
	flow = flows.lookup(&state->flow);
	if (!flow) // the client has closed, or the pod was unenrolled
		return pass(state, bpf_get_netns_cookie(msg), PASSED_NO_PEER);
	mine = state->side & 1;
	theirs = mine ^ 1;
#if RMEM_OFFSET
	// Who replies tells what it has left unread: that gives the other side its budget back.
	if (flow->unread[mine])
		flow->unread[mine] = own_unread(msg);
#endif
	unread = flow->unread[theirs] + msg->size;
	if (unread > MAX_UNREAD)
		return pass(state, flow->client_netns, PASSED_UNREAD);
	found = sockets.msg_redirect_hash(msg, &state->peer, BPF_F_INGRESS);
	if (found != SK_PASS)
		return pass(state, flow->client_netns, PASSED_NO_PEER);
	state->verdict = REDIRECT;
	flow->unread[theirs] = unread;
	flow->bytes[mine] += msg->size;
	flow->messages[mine]++;
	return SK_PASS;
}

int redirector_redirect(struct sk_msg_md *msg)
{
	return redirect(msg);
}
