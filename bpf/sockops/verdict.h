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

#if RMEM_OFFSET
// What this socket itself has not read yet: redirected bytes are charged to sk_rmem_alloc
// (sk_psock_skb_ingress / bpf_tcp_ingress). RMEM_OFFSET comes from the running kernel's BTF.
ALWAYS __u32 own_unread(struct bpf_sock *sk)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	__s32 bytes;

	if (!tp)
		return MAX_UNREAD;
	// Read through BTF; the verifier holds the offset to a member of this type.
	bytes = *(volatile __s32 *)((char *)tp + RMEM_OFFSET);
	return bytes < 0 ? 0 : bytes;
}
#endif
