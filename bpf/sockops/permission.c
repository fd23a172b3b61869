// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What the processes of a pod are refused on sockets of the sockhash (BPF_LSM_CGROUP): ways to read
// that go by TCP's own queue, where nothing is.

#if ORIG_AX_OFFSET

#define MAY_READ 4	    // linux/fs.h
#define SPLICE 275	    // asm/unistd_64.h
#define SPLICE_IA32 313	    // asm/unistd_32.h; to a 64-bit process a call that reads from no socket
#define ZEROCOPY_RECEIVE 35 // TCP_ZEROCOPY_RECEIVE, linux/tcp.h

ALWAYS bool is_splice(void)
{
	char *regs = (char *)bpf_task_pt_regs(bpf_get_current_task_btf());
	__u64 number = *(volatile __u64 *)(regs + ORIG_AX_OFFSET);

	return number == SPLICE || number == SPLICE_IA32;
}

// Also one that could have stayed in the sockhash and did not: nobody who has spliced before is
// told EINVAL, which programs then take for a fault.
ALWAYS bool is_kept_from(char *socket)
{
	struct sock_state *state;
	void *sk;

	if (!socket)
		return false;
	sk = *(void *volatile *)(socket + SOCKET_SK_OFFSET);
	if (!sk)
		return false;
	state = states.sk_storage_get(sk, 0, 0);
	return state && state->flags & FLOW_ACCELERATE && !(state->flags & FLOW_LEFT);
}

// Before a file is read or written (file_permission): splice(2) is answered EINVAL, on which
// programs copy instead.
ALWAYS int splice(__u64 *asked)
{
	if (!(asked[1] & MAY_READ) || !is_splice() ||
	    !is_kept_from((char *)bpf_sock_from_file((struct file *)asked[0])))
		return 1;
	bpf_set_retval(-EINVAL);
	return 0;
}

int redirector_splice(__u64 *asked)
{
	return splice(asked);
}

// Before getsockopt() (socket_getsockopt): TCP_ZEROCOPY_RECEIVE would find that bytes have come and
// no segment that they are in, which the kernel does not expect (tcp_zerocopy_receive).
ALWAYS int zerocopy_receive(__u64 *asked)
{
	if ((__s32)asked[1] != IPPROTO_TCP || (__s32)asked[2] != ZEROCOPY_RECEIVE ||
	    !is_kept_from((char *)asked[0]))
		return 1;
	bpf_set_retval(-ENOPROTOOPT);
	return 0;
}

int redirector_zerocopy(__u64 *asked)
{
	return zerocopy_receive(asked);
}

#endif
