// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Before a process of a pod reads or writes a file (BPF_LSM_CGROUP, file_permission): splice(2)
// from a socket of the sockhash is answered EINVAL, on which programs copy instead. The kernel
// splices from TCP's own queue alone, where redirected bytes never are.

#if ORIG_AX_OFFSET

#define MAY_READ 4	// linux/fs.h
#define SPLICE 275	// asm/unistd_64.h
#define SPLICE_IA32 313 // asm/unistd_32.h; to a 64-bit process a call that reads from no socket

ALWAYS bool is_splice(void)
{
	char *regs = (char *)bpf_task_pt_regs(bpf_get_current_task_btf());
	__u64 number = *(volatile __u64 *)(regs + ORIG_AX_OFFSET);

	return number == SPLICE || number == SPLICE_IA32;
}

// Also one that could have stayed in the sockhash and did not: nobody who has spliced before is
// told EINVAL, which programs then take for a fault.
ALWAYS bool cannot_be_spliced(struct file *file)
{
	char *socket = (char *)bpf_sock_from_file(file);
	struct sock_state *state;
	void *sk;

	if (!socket)
		return false;
	sk = *(void *volatile *)(socket + SOCKET_SK_OFFSET);
	state = states.sk_storage_get(sk, 0, 0);
	return state && state->flags & FLOW_ACCELERATE && !(state->flags & FLOW_LEFT);
}

ALWAYS int splice(__u64 *asked)
{
	if (!(asked[1] & MAY_READ) || !is_splice() || !cannot_be_spliced((struct file *)asked[0]))
		return 1;
	bpf_set_retval(-EINVAL);
	return 0;
}

int redirector_splice(__u64 *asked)
{
	return splice(asked);
}

#endif
