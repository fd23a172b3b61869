// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// send() on a socket of the sockhash (BPF_SK_MSG_VERDICT): to the peer's queue, or on by TCP.
//
// tcp_bpf_recvmsg() reads the redirected queue before TCP's own, so a direction that goes from TCP
// to the queue reorders bytes, and one that goes from the queue to TCP does not. Hence the rule:
// decide before the first byte; later at most once, and only from REDIRECT to PASS.

ALWAYS int pass(struct sock_state *state, __u64 netns, __u32 reason)
{
	state->verdict = PASS;
	state->passed = reason;
	count(netns, reason);
	return SK_PASS;
}

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
	mine = state->side & 1;
	theirs = mine ^ 1;
	// No flow: the client has closed, or the pod was unenrolled. Another id: it has closed just
	// now, and the kernel gave the map's element to another flow, beneath our feet.
	if (!flow || *(volatile __u64 *)&flow->id != state->id)
		return pass(state, bpf_get_netns_cookie(msg), PASSED_NO_PEER);
	if (!state->peer)
		state->peer = *(volatile __u64 *)&flow->socket[theirs];
	// The other end is not there yet. If this is told before it comes, it stays out.
	if (!state->peer && claim(flow, mine, PASS))
		return pass(state, flow->client_netns, PASSED_NO_PEER);
	if (!state->peer)
		state->peer = *(volatile __u64 *)&flow->socket[theirs];
	if (!claim(flow, mine, REDIRECT))
		return pass(state, flow->client_netns, PASSED_LEFT);
#if RMEM_OFFSET
	// Who replies tells what it has left unread: that gives the other side its budget back.
	if (flow->unread[mine]) {
		flow->unread[mine] = own_unread(msg->sk);
		if (!flow->unread[mine])
			flow->drained[mine] = flow->messages[theirs];
	}
#endif
	unread = flow->unread[theirs] + msg->size;
	if (unread > MAX_UNREAD ||
	    flow->messages[mine] - flow->drained[theirs] >= MAX_UNREAD_MESSAGES) {
		flow->verdict[mine] = PASS;
		flow->passed = PASSED_UNREAD;
		state->leaving_ns = bpf_ktime_get_ns();
		return pass(state, flow->client_netns, PASSED_UNREAD);
	}
	if (memory_is_short(msg->sk)) {
		flow->verdict[mine] = PASS;
		flow->passed = PASSED_MEMORY;
		state->leaving_ns = bpf_ktime_get_ns();
		return pass(state, flow->client_netns, PASSED_MEMORY);
	}
	found = sockets.msg_redirect_hash(msg, &state->peer, BPF_F_INGRESS);
	if (found != SK_PASS) {
		flow->verdict[mine] = PASS;
		flow->passed = PASSED_NO_PEER;
		return pass(state, flow->client_netns, PASSED_NO_PEER);
	}
	flow->unread[theirs] = unread;
	flow->bytes[mine] += msg->size;
	flow->messages[mine]++;
	return SK_PASS;
}

int redirector_redirect(struct sk_msg_md *msg)
{
	return redirect(msg);
}
