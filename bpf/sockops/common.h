// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Helpers of more than one program. bcc rewrites pointer reads in functions of external linkage,
// so every body here and in the programs is static.

#define ALWAYS static __always_inline

// An IPv6 address word by word: contexts allow no other access, hence no pointer to them.
#define COPY_WORDS(TO, FROM)                                                                       \
	do {                                                                                       \
		(TO)[0] = (FROM)[0];                                                               \
		(TO)[1] = (FROM)[1];                                                               \
		(TO)[2] = (FROM)[2];                                                               \
		(TO)[3] = (FROM)[3];                                                               \
	} while (0)

// By its number: where bcc may not read /proc/kallsyms (CAP_SYSLOG, kptr_restrict), it takes the
// kernel for one without bpf_probe_read_kernel and writes another helper instead.
static long (*read_kernel)(void *, __u32, const void *) = (void *)BPF_FUNC_probe_read_kernel;

ALWAYS void count_by(__u64 netns, __u32 which, __u64 amount)
{
	struct counters *c = counters.lookup(&netns);

	if (c && which < COUNTERS)
		c->value[which] += amount;
}

ALWAYS void count(__u64 netns, __u32 which)
{
	count_by(netns, which, 1);
}

// A decision; also STEERED_*, when it was to steer, else COUNTERS.
ALWAYS void count_rule(__u64 netns, __u32 rule, __u32 steered)
{
	struct counters *c = counters.lookup(&netns);

	if (!c || rule >= RULES)
		return;
	c->rule[rule] += 1;
	if (steered < COUNTERS)
		c->value[steered] += 1;
}

ALWAYS void count_connect(__u64 netns, __u32 kind, __u32 us)
{
	struct counters *c = counters.lookup(&netns);
	struct latency *latency;
	__u64 bucket;

	if (!c || kind >= CONNECT_KINDS)
		return;
	latency = &c->connect[kind];
	latency->total_us += us;
	bucket = us > 1 ? bpf_log2l(us - 1) : 0;
	// Clang would compare another register than it indexes with, and Linux 6.1 refuse that.
	asm volatile("" : "+r"(bucket));
	if (bucket >= CONNECT_BUCKETS)
		bucket = CONNECT_BUCKETS - 1;
	latency->bucket[bucket]++;
}

ALWAYS struct address mapped(__be32 ip4)
{
	struct address a = {{0, 0, bpf_htonl(0xffff), ip4}};

	return a;
}

ALWAYS bool is_v4(const struct address *a)
{
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == bpf_htonl(0xffff);
}

ALWAYS bool same(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

ALWAYS bool is_any(const struct address *a)
{
	return (a->word[0] | a->word[1] | a->word[2] | a->word[3]) == 0;
}

ALWAYS bool is_v4_loopback(const struct address *a)
{
	return is_v4(a) && (bpf_ntohl(a->word[3]) >> 24) == 127;
}

// Exactly 127.0.0.<last> or ::<last>.
ALWAYS bool is_local(const struct address *a, __u32 last)
{
	if (is_v4(a))
		return a->word[3] == bpf_htonl(0x7f000000 | last);
	return (a->word[0] | a->word[1] | a->word[2]) == 0 && a->word[3] == bpf_htonl(last);
}

// 127/8, ::1 and ::6: what no packet from outside may claim. Other low IPv6 addresses may come.
ALWAYS bool is_loopback(const struct address *a)
{
	return is_v4_loopback(a) || is_local(a, 1) || is_local(a, 6);
}

// 127.1/16, where connections that are steered come (connect.c), and no others.
#define STEERED_LOOPBACK 0x7f01

ALWAYS bool is_steered_loopback(const struct address *a)
{
	return is_v4(a) && bpf_ntohl(a->word[3]) >> 16 == STEERED_LOOPBACK;
}

// Where a connection is local to the pod, and nobody was steered to.
ALWAYS bool is_plain_loopback(const struct address *a)
{
	return is_loopback(a) && !is_steered_loopback(a);
}

// 169.254/16 and fe80::/10: unique on their link, not on the node.
ALWAYS bool is_link_local(const struct address *a)
{
	if (is_v4(a))
		return bpf_ntohl(a->word[3]) >> 16 == 0xa9fe;
	return bpf_ntohl(a->word[0]) >> 22 == 0xfe80 >> 6;
}

// Tuples within one namespace may repeat in another; tuples between pods cannot.
ALWAYS void scope(struct flow_key *key, __u64 netns)
{
	bool inside = same(&key->client, &key->server) || is_loopback(&key->client) ||
		      is_loopback(&key->server) || is_link_local(&key->client) ||
		      is_link_local(&key->server);

	key->netns = inside ? netns : 0;
}

// The host itself: ::1 and, by default, 127.0.0.1.
ALWAYS bool is_host(const struct pod *pod, const struct address *a)
{
	if (is_v4(a))
		return (a->word[3] & pod->host_loopback_mask) == pod->host_loopback;
	return is_local(a, 1);
}

// 0 when no range of the set holds the address, else enum cidr_value of the longest that does.
ALWAYS __u8 cidr_listed(__u64 netns, struct address *ip, __u32 set)
{
	struct cidr_key key = {
	    .prefixlen = 96 + 128,
	    .netns_low = netns,
	    .netns_high = netns >> 32,
	    .set = set | (is_v4(ip) ? 0 : CIDR_V6),
	    .ip = *ip,
	};
	__u8 *value = cidrs.lookup(&key);

	return value ? *value : 0;
}

// `owner` is what pods_by_address has for the address.
ALWAYS bool is_owned(const struct pod *pod, __u64 *owner, struct address *ip, __u64 netns)
{
	if (owner && *owner == netns)
		return true;
	return (is_link_local(ip) || pod->flags & POD_REPEATED) && cidr_listed(netns, ip, CIDR_OWN);
}

ALWAYS bool is_own(const struct pod *pod, struct address *ip, __u64 netns)
{
	__u64 *owner = pods_by_address.lookup(ip);

	return is_owned(pod, owner, ip, netns);
}

ALWAYS bool is_member(__u64 netns, __u32 value, __u32 set)
{
	struct member_key key = {.netns = netns, .value = value, .set = set};

	return members.lookup(&key) != NULL;
}

// The effective ids, as xt_owner compares them; bpf_get_current_uid_gid() tells the real ones.
struct ids {
	__u32 uid;
	__u32 gid;
};

ALWAYS struct ids current_ids(void)
{
#if CRED_OFFSET && FSUID_OFFSET && FSGID_OFFSET
	char *task = (char *)bpf_get_current_task_btf();
	// Read through BTF; the verifier holds the offsets to members of these types.
	char *cred = *(char *volatile *)(task + CRED_OFFSET);

	if (cred) {
		struct ids ids = {.uid = *(volatile __u32 *)(cred + FSUID_OFFSET),
				  .gid = *(volatile __u32 *)(cred + FSGID_OFFSET)};

		return ids;
	}
#endif
	__u64 real = bpf_get_current_uid_gid();
	struct ids ids = {.uid = real, .gid = real >> 32};

	return ids;
}

// Who owns the socket of connect() or sendmsg(), as xt_owner knows it: who made its file. Another
// may use it since: a descriptor that was handed over, a process that has changed its ids.
ALWAYS struct ids owner_ids(struct bpf_sock_addr *ctx)
{
#if SK_SOCKET_OFFSET && SOCKET_FILE_OFFSET && FILE_CRED_OFFSET && FSUID_OFFSET && FSGID_OFFSET
	struct ids owner;
	char *at;

	// Sockets of the kernel's own (subflows of MPTCP) have no file.
	if (!read_kernel(&at, sizeof(at), (char *)ctx + SOCK_ADDR_SK_OFFSET) &&
	    !read_kernel(&at, sizeof(at), at + SK_SOCKET_OFFSET) && at &&
	    !read_kernel(&at, sizeof(at), at + SOCKET_FILE_OFFSET) && at &&
	    !read_kernel(&at, sizeof(at), at + FILE_CRED_OFFSET) && at &&
	    !read_kernel(&owner.uid, sizeof(owner.uid), at + FSUID_OFFSET) &&
	    !read_kernel(&owner.gid, sizeof(owner.gid), at + FSGID_OFFSET))
		return owner;
#endif
	return current_ids();
}

ALWAYS bool is_proxy_uid(const struct pod *pod, __u32 uid)
{
#pragma unroll
	for (int i = 0; i < MAX_PROXY_IDS; i++)
		if (i < pod->proxy_uids && pod->proxy_uid[i] == uid)
			return true;
	return false;
}

ALWAYS bool is_proxy_gid(const struct pod *pod, __u32 gid)
{
#pragma unroll
	for (int i = 0; i < MAX_PROXY_IDS; i++)
		if (i < pod->proxy_gids && pod->proxy_gid[i] == gid)
			return true;
	return false;
}
