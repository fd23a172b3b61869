// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What redirect.c and sockops.c share: the verdict of a direction, and what a reader has left
// unread.

// Redirected bytes know no receive window. Past this many unread ones a direction goes to TCP,
// whose window then holds the sender back.
#define MAX_UNREAD (1 << 20)
// Each message costs the kernel 1 KiB (struct sk_msg) beside its bytes, charged to nobody.
#define MAX_UNREAD_MESSAGES 4096

// Makes a direction's verdict `wanted` if it is still open, and tells whether that is its verdict
// now. Both ends may try at once: one of them wins.
ALWAYS bool claim(struct flow *flow, __u32 side, __u64 wanted)
{
	__u64 *verdict = &flow->verdict[side & 1];
	__u64 before = *(volatile __u64 *)verdict;

	if (before == UNDECIDED)
		before = __sync_val_compare_and_swap(verdict, UNDECIDED, wanted);
	return before == UNDECIDED || before == wanted;
}

// What follows reads the kernel's own structs through BTF; the offsets come from the running
// kernel, 0 without BTF. The verifier holds each to a member of its type.

// Whether SO_ZEROCOPY is set.
ALWAYS bool wants_zerocopy(struct bpf_sock *sk)
{
#if FLAGS_OFFSET
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);

	if (tp)
		return *(volatile __u64 *)((char *)tp + FLAGS_OFFSET) >> ZEROCOPY_BIT & 1;
#endif
	return false;
}

// enum sock_flags (net/sock.h)
#define SOCK_DEAD_BIT 0
#define SOCK_DONE_BIT 1

// Whether a FIN has come, and somebody still reads.
ALWAYS bool has_ended(struct bpf_sock *sk)
{
#if FLAGS_OFFSET
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	__u64 flags;

	if (!tp)
		return false;
	flags = *(volatile __u64 *)((char *)tp + FLAGS_OFFSET);
	return flags >> SOCK_DONE_BIT & 1 && !(flags >> SOCK_DEAD_BIT & 1);
#else
	return false;
#endif
}

#define SOCK_NOSPACE_BIT 2 // linux/net.h
#define NONBLOCK 04000	   // O_NONBLOCK, asm-generic/fcntl.h

// Whether it is certain that nobody is blocked in recv(): a sender waits for room, or the socket
// does not block, or nobody waits for it at all.
ALWAYS bool no_reader_blocks(struct bpf_sock *sk)
{
#if WAIT_HEAD_OFFSET
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	char *socket, *file, *head;

	if (!tp)
		return false;
	socket = *(char *volatile *)((char *)tp + SK_SOCKET_OFFSET);
	if (*(volatile __u64 *)(socket + SOCKET_FLAGS_OFFSET) >> SOCK_NOSPACE_BIT & 1)
		return true;
	file = *(char *volatile *)(socket + SOCKET_FILE_OFFSET);
	if (*(volatile __u32 *)(file + FILE_FLAGS_OFFSET) & NONBLOCK)
		return true;
	head = socket + SOCKET_WQ_OFFSET + WQ_WAIT_OFFSET + WAIT_HEAD_OFFSET;
	return *(char *volatile *)head == head;
#else
	return false;
#endif
}

// Whether TCP's memory on this node, redirected bytes included, comes near the mark where the
// kernel saves it (net.ipv4.tcp_mem). It then refuses redirected bytes with ENOMEM, and TCP's with
// EAGAIN.
ALWAYS bool memory_is_short(struct bpf_sock *sk)
{
#if MEMORY_ALLOCATED_OFFSET
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	void *proto, *counter;
	__s64 pages = 0;

	if (!tp)
		return false;
	proto = *(void *volatile *)((char *)tp + PROTO_OFFSET);
	counter = *(void *volatile *)((char *)proto + MEMORY_ALLOCATED_OFFSET);
	read_kernel(&pages, sizeof(pages), counter);
	return pages > MEMORY_MARK;
#else
	return false;
#endif
}

#if RMEM_OFFSET
// What this socket itself has not read yet: redirected bytes are charged to sk_rmem_alloc
// (sk_psock_skb_ingress / bpf_tcp_ingress).
ALWAYS __u32 own_unread(struct bpf_sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	__s32 bytes;

	if (!tp)
		return MAX_UNREAD;
	bytes = *(volatile __s32 *)((char *)tp + RMEM_OFFSET);
	return bytes < 0 ? 0 : bytes;
}
#endif
