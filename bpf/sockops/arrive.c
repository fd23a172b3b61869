// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What TCP brings to a socket of the sockhash (BPF_SK_SKB_STREAM_VERDICT): on to the queue that
// redirected bytes go to. With two queues, a recv() that empties the first answers less than was
// asked for, which readers of edge-triggered epoll take for the end of what there is (nginx, Netty,
// tokio); and some kernels then tell FIONREAD of one queue only.

// The kernel takes at most so much off the front of a segment at a time (sk_skb_adjust_room).
#define MAX_CUT 4095
// GSO_MAX_SIZE (linux/netdevice.h), the longest segment there can be.
#define MAX_SEGMENT (8 * 65535)

// A segment may begin with bytes that came before: TCP merges what it sends again with what follows
// (tcp_retrans_try_collapse). tcp_recvmsg() skips them; tcp_read_skb(), which brings segments here,
// does not. 0: what is left begins where the last one ended.
ALWAYS __s32 cut(struct __sk_buff *skb, __s32 twice)
{
	for (int i = 0; i < MAX_SEGMENT / MAX_CUT + 1; i++) {
		__s32 size = twice < MAX_CUT ? twice : MAX_CUT;

		if (size <= 0 || bpf_skb_adjust_room(skb, -size, 0, 0))
			break;
		twice -= size;
	}
	return twice;
}

// Whether this is the end of what comes to a socket that closed() has left the entry of. Beyond its
// `length` bytes, a FIN counts as one.
ALWAYS bool is_last(struct __sk_buff *skb, __u32 length)
{
	struct bpf_sock *sk = skb->sk;

	return sk && sk->state == BPF_TCP_CLOSE && skb->cb[1] - skb->cb[0] > length;
}

int redirector_arrive(struct __sk_buff *skb)
{
	// struct tcp_skb_cb begins with the sequence numbers of the segment's start and end.
	__u32 start = skb->cb[0], end = skb->cb[1], length = skb->len;
	__u64 cookie = bpf_get_socket_cookie(skb);
	__u32 *arrived_to;

	// A FIN alone, which is all that TCP brings to most: nothing in it to come twice.
	if (!length) {
		if (is_last(skb, length))
			arrived.delete(&cookie);
		return SK_PASS;
	}
	arrived_to = arrived.lookup(&cookie);
	if (!arrived_to) {
		if (!is_last(skb, length))
			arrived.update(&cookie, &end);
		return SK_PASS;
	}
	// Without the memory to cut it off, what would be read is wrong: the stream ends here.
	if (cut(skb, *arrived_to - start))
		return SK_DROP;
	*arrived_to = end;
	if (is_last(skb, length))
		arrived.delete(&cookie);
	return SK_PASS;
}
