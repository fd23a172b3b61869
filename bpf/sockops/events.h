// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Events for whoever follows: a connection opens, closes, fails or is refused. Each follower has a
// ring buffer of its own, so that none takes another's events.

// The slots in use, one bit each. 0: nobody follows, and this load is all that it costs.
ALWAYS __u32 followed(void)
{
	__u32 zero = 0;
	__u32 *slots = following.lookup(&zero);

	return slots ? *slots : 0;
}

ALWAYS void publish(struct event *event, __u32 slots)
{
	event->at_ns = bpf_ktime_get_ns();
#pragma unroll
	for (__u32 slot = 0; slot < MAX_FOLLOWERS; slot++) {
		__u32 key = slot;
		__u64 *lost;
		void *ring;

		if (!(slots & (1 << slot)))
			continue;
		ring = followers.lookup(&key);
		if (!ring)
			continue;
		// A follower looks every now and then: waking it for each event would cost more
		// than the event.
		if (!bpf_ringbuf_output(ring, event, sizeof(*event), BPF_RB_NO_WAKEUP))
			continue;
		lost = lost_events.lookup(&key);
		if (lost)
			__sync_fetch_and_add(lost, 1);
	}
}

ALWAYS void current_process(struct process *process)
{
	process->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(process->comm, sizeof(process->comm));
}

// The connection that this state belongs to.
ALWAYS struct event event_of(const struct sock_state *state, __u64 netns, __u32 kind)
{
	struct event event = {
	    .opened_ns = state->opened_ns,
	    .id = state->id,
	    .netns = netns,
	    .client = {.ip = state->flow.client, .port = state->flow.client_port},
	    .server = {.ip = state->flow.server, .port = state->flow.server_port},
	    .process = state->process,
	    .connect_us = state->connect_us,
	    .flags = state->flags,
	    .rule = state->rule,
	    .kind = kind,
	};

	if (state->flags & FLOW_STEERED)
		event.server = state->original;
	return event;
}

#define SOCK_DONE 2 // include/net/sock.h, as a bit: a FIN has come

// Bytes that TCP has delivered. Its own counts hold SYN and FIN, too (RFC 4898).
ALWAYS __u64 tcp_sent(struct bpf_sock_ops *ops, __u32 side)
{
	__u64 bytes = ops->bytes_acked;
	__u32 before = ops->args[0];

	if (side == CLIENT && bytes)
		bytes--;
	if (ops->op == BPF_SOCK_OPS_STATE_CB && bytes && ops->snd_una == ops->snd_nxt &&
	    (before == BPF_TCP_FIN_WAIT2 || before == BPF_TCP_LAST_ACK ||
	     before == BPF_TCP_CLOSING))
		bytes--;
	return bytes;
}

ALWAYS __u64 tcp_received(struct bpf_sock_ops *ops)
{
	__u64 bytes = ops->bytes_received;
#if FLAGS_OFFSET
	struct bpf_sock *sk = ops->sk;
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : NULL;

	if (tp && bytes && *(volatile unsigned long *)((char *)tp + FLAGS_OFFSET) & SOCK_DONE)
		bytes--;
#endif
	return bytes;
}

// `flow` is NULL where there is none.
ALWAYS void tell(struct bpf_sock_ops *ops, const struct sock_state *state, const struct flow *flow,
		 __u32 kind)
{
	__u32 slots = followed();
	__u32 side = state->side & 1;
	struct event event;

	if (!slots)
		return;
	event = event_of(state, bpf_get_netns_cookie(ops), kind);
	event.sent = tcp_sent(ops, side);
	event.received = tcp_received(ops);
	event.reason = state->passed;
	if (flow) {
		event.sent += flow->bytes[side];
		event.received += flow->bytes[side ^ 1];
		event.redirected = flow->bytes[CLIENT] + flow->bytes[SERVER];
		event.sides = !!flow->socket[CLIENT] + !!flow->socket[SERVER];
		if (flow->passed)
			event.reason = flow->passed;
	}
	publish(&event, slots);
	// Its other end came in at a pod of this node, which tells of it at the same time, because
	// only one of them can be the last to know the flow.
	if (kind == EVENT_CLOSE && side == CLIENT && flow && flow->server_netns) {
		__u64 sent = event.sent;

		event.netns = flow->server_netns;
		event.rule = flow->server_rule;
		event.sent = event.received;
		event.received = sent;
		event.process = (struct process){};
		publish(&event, slots);
	}
}

ALWAYS void tell_refused(struct event *event)
{
	__u32 slots = followed();

	if (!slots)
		return;
	event->kind = EVENT_REFUSED;
	publish(event, slots);
}
