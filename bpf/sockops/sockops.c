// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// The life of a connection (BPF_CGROUP_SOCK_OPS): flows are kept from the client's SYN to its
// close; established ends enter the sockhash; the sidecar's inbound listener is found as it
// listens.

#define SYN 0x02

ALWAYS void addresses(struct bpf_sock_ops *ops, struct address *local, struct address *remote)
{
	if (ops->family == AF_INET) {
		*local = mapped(ops->local_ip4);
		*remote = mapped(ops->remote_ip4);
		return;
	}
	COPY_WORDS(local->word, ops->local_ip6);
	COPY_WORDS(remote->word, ops->remote_ip6);
}

ALWAYS struct sock_state *state_of(struct bpf_sock_ops *ops, __u64 flags)
{
	struct bpf_sock *sk = ops->sk;

	return sk ? states.sk_storage_get(sk, 0, flags) : NULL;
}

ALWAYS void leave_brief_ones_out(struct sock_state *state, __u64 netns)
{
	__u32 habit = habit_of(state, netns);

	state->habit = habit + 1;
	if (!are_brief(habit, state->opened_ns))
		return;
	state->flags &= ~FLOW_ACCELERATE;
	state->passed = PASSED_BRIEF;
	count(netns, PASSED_BRIEF);
}

// Takes what an earlier connection left unread away from the next one. Answers the state, if that
// one has any.
ALWAYS struct sock_state *starts_again(struct bpf_sock_ops *ops, struct sock_state *state)
{
	__u64 cookie = bpf_get_socket_cookie(ops);
	struct bpf_sock *sk = ops->sk;

	sockets.delete(&cookie);
	state->flags &= ~FLOW_AGAIN;
	if (state->flags)
		return state;
	if (sk)
		states.sk_storage_delete(sk);
	return NULL;
}

// tcp_connect(), before the SYN leaves: the source port is known, nobody has answered yet.
ALWAYS void client_starts(struct bpf_sock_ops *ops)
{
	struct sock_state *state = state_of(ops, 0);
	struct flow flow = {};
	__u64 netns;
	__u32 lacks;

	if (state && state->flags & FLOW_AGAIN)
		state = starts_again(ops, state);
	if (!state)
		return;
	netns = bpf_get_netns_cookie(ops);
	state->opened_ns = bpf_ktime_get_ns();
	addresses(ops, &state->flow.client, &state->flow.server);
	state->flow.client_port = ops->local_port;
	state->flow.server_port = bpf_ntohl(ops->remote_port);
	scope(&state->flow, netns);
	state->id = bpf_get_socket_cookie(ops);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	if (state->flags & FLOW_ACCELERATE)
		leave_brief_ones_out(state, netns);
	if (!(state->flags & (FLOW_STEERED | FLOW_ACCELERATE)))
		return;

	flow.id = state->id;
	flow.original = state->original;
	flow.flags = state->flags;
	flow.client_netns = netns;
	flow.opened_ns = state->opened_ns;
	flow.process = state->process;
	flow.rule = state->rule;
	flow.passed = state->passed;
	// Without its flow a steered SYN is refused by inbound.c, an accelerated one stays plain.
	lacks = keep_flow(&state->flow, &flow);
	if (!lacks)
		return;
	if (!(state->flags & FLOW_STEERED))
		count(netns, lacks);
	state->flags &= ~FLOW_ACCELERATE;
	state->passed = lacks;
}

// Both ends are in the sockhash, or neither is. TCP's bytes for a socket that is in it take a
// longer way, and one that has not been accepted yet does not tell FIONREAD of them.
ALWAYS void stay_out(struct sock_state *state, struct flow *flow, __u64 netns, __u32 reason)
{
	state->verdict = PASS;
	state->passed = reason;
	flow->passed = reason;
	claim(flow, CLIENT, PASS);
	claim(flow, SERVER, PASS);
	count(netns, reason);
}

ALWAYS bool enter_sockhash(struct bpf_sock_ops *ops, struct sock_state *state, struct flow *flow)
{
	__u64 cookie = bpf_get_socket_cookie(ops);
	__u64 netns = bpf_get_netns_cookie(ops);
	int failed;

	if (ops->sk && wants_zerocopy(ops->sk)) {
		stay_out(state, flow, netns, PASSED_ZEROCOPY);
		return false;
	}
	failed = sockets.sock_hash_update(ops, &cookie, BPF_ANY); // bcc ends it with a semicolon
	if (failed) {
		stay_out(state, flow, netns, failed == -E2BIG ? PASSED_FULL : PASSED_UNSUPPORTED);
		return false;
	}
	flow->socket[state->side & 1] = cookie;
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG |
					   BPF_SOCK_OPS_RTT_CB_FLAG);
	return true;
}

ALWAYS void leave_sockhash(struct bpf_sock_ops *ops, struct sock_state *state, struct flow *flow)
{
	sockets.delete(&flow->socket[state->side & 1]);
	state->verdict = PASS;
	state->flags |= FLOW_LEFT;
}

// What is in a socket's queue when it leaves the sockhash is lost.
ALWAYS bool nothing_queued(struct bpf_sock_ops *ops)
{
#if RMEM_OFFSET
	return ops->sk && !own_unread(ops->sk);
#else
	return false;
#endif
}

// Whether nothing was ever redirected to this side, and from now on nothing will be.
ALWAYS bool never_redirected(struct sock_state *state, struct flow *flow, __u32 theirs)
{
	return !state->leaving_acked && claim(flow, theirs, PASS) && !flow->messages[theirs & 1];
}

// An ACK has come in. A socket of the sockhash whose blocking recv() is woken without data answers
// EAGAIN (tcp_bpf_recvmsg_parser waits once), and a sender that has waited for room is woken so
// when its buffer drains. So who streams leaves the sockhash, but not while somebody is blocked in
// recv(), which would answer EAGAIN, too. It must be certain that nothing is on its way to its
// queue: because nothing ever was, or because the peer has since been passing for a second, or has
// read more TCP bytes than its buffer holds; its earlier send() has ended then.
ALWAYS void streams(struct bpf_sock_ops *ops)
{
	struct sock_state *state = state_of(ops, 0);
	struct flow *flow;
	__u32 theirs;

	// Others may want this callback: it is not turned off for those who have left.
	if (!state || state->verdict != PASS || state->flags & FLOW_LEFT)
		return;
	if (!state->leaving_ns && ops->bytes_acked < MAX_UNREAD)
		return;
	if (!ops->sk || !no_reader_blocks(ops->sk))
		return;
	flow = flows.lookup(&state->flow);
	if (!flow)
		return;
	theirs = (state->side ^ 1) & 1;
	if (never_redirected(state, flow, theirs)) {
		if (nothing_queued(ops))
			leave_sockhash(ops, state, flow);
		return;
	}
	if (!state->leaving_acked) {
		flow->verdict[theirs] = PASS;
		state->leaving_ns = bpf_ktime_get_ns();
		state->leaving_acked = ops->bytes_acked + 1; // 0 is: not yet
		return;
	}
	if ((ops->bytes_acked - state->leaving_acked > MAX_RECEIVE_BUFFER ||
	     bpf_ktime_get_ns() - state->leaving_ns > 1000000000ULL) &&
	    nothing_queued(ops))
		leave_sockhash(ops, state, flow);
}

// shutdown(SHUT_WR): the ACK of the FIN wakes a blocking recv(), too.
ALWAYS void half_closes(struct bpf_sock_ops *ops)
{
	struct sock_state *state = state_of(ops, 0);
	struct flow *flow;

	if (!state || !(state->flags & FLOW_ACCELERATE))
		return;
	flow = flows.lookup(&state->flow);
	if (flow && never_redirected(state, flow, state->side ^ 1) && nothing_queued(ops))
		leave_sockhash(ops, state, flow);
}

ALWAYS void client_accelerates(struct bpf_sock_ops *ops, struct sock_state *state,
			       struct flow *flow)
{
	// TCP Fast Open: these bytes went before us, the rest must follow on the same way.
	if (ops->data_segs_out)
		stay_out(state, flow, bpf_get_netns_cookie(ops), PASSED_FAST_OPEN);
	else if (enter_sockhash(ops, state, flow))
		count(flow->client_netns, ACCELERATED);
}

ALWAYS void client_established(struct bpf_sock_ops *ops)
{
	struct sock_state *state = state_of(ops, 0);
	struct flow *flow = NULL;

	if (!state) {
		// Direct: nothing of ours went with it. A SYN that is lost is sent again after a
		// second (TCP_TIMEOUT_INIT).
		count_connect(bpf_get_netns_cookie(ops), CONNECT_DIRECT,
			      (ops->srtt_us >> 3) + ops->total_retrans * 1000000);
		return;
	}
	state->connect_us = (bpf_ktime_get_ns() - state->opened_ns) / 1000;
	count_connect(bpf_get_netns_cookie(ops),
		      state->flags & FLOW_STEERED ? CONNECT_STEERED : CONNECT_DIRECT,
		      state->connect_us);
	if (state->flags & FLOW_ACCELERATE) {
		flow = flows.lookup(&state->flow);
		if (flow)
			client_accelerates(ops, state, flow);
	}
	tell(ops, state, flow, EVENT_OPEN);
}

// A connection came in while somebody follows: both ends tell of it, each for its own pod.
ALWAYS void came_in(struct bpf_sock_ops *ops, struct flow_key *key, struct flow *flow)
{
	struct sock_state *state, told = {.side = SERVER};
	__u32 *rule = arrivals.lookup(key);

	if (!rule)
		return;
	told.flow = *key;
	told.rule = *rule;
	told.opened_ns = bpf_ktime_get_ns();
	arrivals.delete(key);
	if (flow) {
		told.id = flow->id;
		flow->server_rule = told.rule;
		flow->server_netns = bpf_get_netns_cookie(ops);
	} else {
		told.id = bpf_get_socket_cookie(ops);
		told.flags = FLOW_WATCHED;
		state = state_of(ops, BPF_SK_STORAGE_GET_F_CREATE);
		if (!state)
			return;
		*state = told;
		bpf_sock_ops_cb_flags_set(ops,
					  ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	}
	tell(ops, &told, flow, EVENT_OPEN);
}

// The server's end follows the client's. Whether the client waits for it is decided by one
// compare-and-swap of the client's verdict, here and in redirect.c.
ALWAYS void server_enters(struct bpf_sock_ops *ops, struct sock_state *state, struct flow *flow,
			  __u64 netns)
{
	bool entered = false;

	if (ops->skb_tcp_flags & SYN) // it made this socket, so it carried data: TCP Fast Open
		stay_out(state, flow, netns, PASSED_FAST_OPEN);
	else
		entered = enter_sockhash(ops, state, flow);
	if (entered && claim(flow, CLIENT, REDIRECT)) {
		count(netns, ACCELERATED);
		return;
	}
	if (entered) {
		leave_sockhash(ops, state, flow);
		stay_out(state, flow, netns, PASSED_NO_PEER);
	}
	// Nothing was ever sent to the client: its queue is empty.
	sockets.delete(&flow->socket[CLIENT]);
	flow->socket[CLIENT] = 0;
	flow->socket[SERVER] = 0;
}

ALWAYS void server_established(struct bpf_sock_ops *ops)
{
	__u64 netns = bpf_get_netns_cookie(ops);
	struct flow_key key = {};
	struct sock_state *state;
	struct flow *flow;

	// Two connect() that meet, or one that meets itself: neither end was accepted.
	if (state_of(ops, 0))
		return;
	addresses(ops, &key.server, &key.client);
	key.server_port = ops->local_port;
	key.client_port = bpf_ntohl(ops->remote_port);
	scope(&key, netns);
	flow = flows.lookup(&key);
	if (followed())
		came_in(ops, &key, flow);
	if (!flow)
		return;
	state = state_of(ops, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state)
		return;
	state->flow = key;
	state->id = flow->id;
	state->original = flow->original;
	state->side = SERVER;
	state->flags = flow->flags;
	if (flow->flags & FLOW_ACCELERATE)
		server_enters(ops, state, flow, netns);
}

// What went either way: redirected, or in segments of TCP's.
ALWAYS __u64 messages_of(struct bpf_sock_ops *ops, const struct flow *flow)
{
	__u64 messages = ops->data_segs_out + ops->data_segs_in;

	if (flow)
		messages += flow->messages[CLIENT] + flow->messages[SERVER];
	return messages;
}

// Whether inbound.c has refused this SYN: it came to a port of the pod's sidecar without a flow.
ALWAYS bool had_no_flow(struct sock_state *state, __u64 netns)
{
	struct pod *pod = pods.lookup(&netns);

	if (!pod || pod->flags & POD_TAKEOVER || is_plain_loopback(&state->flow.server))
		return false;
	if (state->flow.server_port != pod->outbound_port &&
	    state->flow.server_port != pod->inbound_port)
		return false;
	return is_loopback(&state->flow.server) || same(&state->flow.client, &state->flow.server) ||
	       is_own(pod, &state->flow.server, netns);
}

ALWAYS void tell_failed(struct bpf_sock_ops *ops, struct sock_state *state, const struct flow *flow)
{
	if (!followed())
		return;
	if (flow || !had_no_flow(state, bpf_get_netns_cookie(ops))) {
		tell(ops, state, flow, EVENT_FAILED);
		return;
	}
	if (state->passed != REFUSED_NO_SHARE)
		state->passed = REFUSED_NO_FLOW;
	tell(ops, state, flow, EVENT_REFUSED);
}

// Whether TCP brings the last segment only now: the FIN that comes to who has half-closed makes it
// closed before it is read (tcp_fin). arrive.c deletes the entry then.
ALWAYS bool last_is_to_come(struct bpf_sock_ops *ops, struct sock_state *state)
{
	return state && !(state->flags & FLOW_LEFT) && ops->args[0] == BPF_TCP_FIN_WAIT2 &&
	       ops->sk && has_ended(ops->sk);
}

ALWAYS void closed(struct bpf_sock_ops *ops)
{
	struct sock_state *state = state_of(ops, 0);
	__u64 cookie = bpf_get_socket_cookie(ops);
	__u32 before = ops->args[0];
	struct flow *flow;

	if (!last_is_to_come(ops, state) && arrived.lookup(&cookie))
		arrived.delete(&cookie);
	if (!state || before == BPF_TCP_CLOSE ||
	    (state->side != CLIENT && !(state->flags & FLOW_WATCHED)))
		return;
	flow = flows.lookup(&state->flow);
	if (flow && flow->id != state->id)
		flow = NULL;
	if (before == BPF_TCP_SYN_SENT) {
		tell_failed(ops, state, flow);
	} else {
		if (state->habit)
			note_habit(state->habit - 1, messages_of(ops, flow), bpf_ktime_get_ns());
		tell(ops, state, flow, EVENT_CLOSE);
	}
	if (!flow)
		return;
	if (flow->messages[CLIENT] + flow->messages[SERVER]) {
		count_by(flow->client_netns, REDIRECTED_BYTES,
			 flow->bytes[CLIENT] + flow->bytes[SERVER]);
		count_by(flow->client_netns, REDIRECTED_MESSAGES,
			 flow->messages[CLIENT] + flow->messages[SERVER]);
	}
	drop_flow(&state->flow, flow->client_netns);
}

ALWAYS void sidecar_listens(struct bpf_sock_ops *ops)
{
	__u64 netns = bpf_get_netns_cookie(ops);
	struct pod *pod = pods.lookup(&netns);
	struct listener_key key = {.netns = netns, .family = ops->family};
	int failed;

	if (!pod || ops->local_port != pod->inbound_port)
		return;
#pragma unroll
	for (int slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot;
		failed = listeners.sock_hash_update(ops, &key, BPF_NOEXIST);
		if (!failed)
			return;
	}
	// More than fit: the oldest stay, and of the others the newest.
	key.slot = LISTENER_SLOTS / 2 + bpf_get_socket_cookie(ops) % (LISTENER_SLOTS / 2);
	listeners.sock_hash_update(ops, &key, BPF_ANY);
}

ALWAYS void sockops(struct bpf_sock_ops *ops)
{
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		client_starts(ops);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		client_established(ops);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		server_established(ops);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		sidecar_listens(ops);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		streams(ops);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ops->args[1] == BPF_TCP_FIN_WAIT1)
			half_closes(ops);
		else if (ops->args[1] == BPF_TCP_CLOSE)
			closed(ops);
		break;
	}
}

int redirector_sockops(struct bpf_sock_ops *ops)
{
	sockops(ops);
	return 1;
}
