// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Map declarations. Sizes come from the loader (redirector/datapath/loader.py).

// netns cookie -> how this pod is steered.
BPF_TABLE("hash", __u64, struct pod, pods, MAX_PODS);
// A pod's own address -> netns cookie of that pod; those that others have, too, are in `cidrs`.
BPF_TABLE("hash", struct address, __u64, pods_by_address, MAX_ADDRESSES);
// CIDR lists of all pods; longest prefix match.
BPF_F_TABLE("lpm_trie", struct cidr_key, __u8, cidrs, MAX_CIDRS, BPF_F_NO_PREALLOC);
// Port and group lists of all pods.
BPF_TABLE("hash", struct member_key, __u8, members, MAX_MEMBERS);
// netns cookie -> counters.
BPF_F_TABLE("percpu_hash", __u64, struct counters, counters, MAX_PODS, BPF_F_NO_PREALLOC);

// Connections that a pod's process opened and that we steer or accelerate, until the client closes.
BPF_TABLE("hash", struct flow_key, struct flow, flows, MAX_FLOWS);
// netns cookie -> how many of them its pod has.
BPF_TABLE("hash", __u64, __s64, shares, MAX_PODS);
// enum room -> a number of flows.
BPF_TABLE("array", __u32, __s64, room, ROOMS);
// What each socket carries; freed with the socket.
BPF_SK_STORAGE(states, struct sock_state);
// Socket cookie -> sequence number up to which TCP brought bytes to a socket of the sockhash, until
// it closes. Programs that see these bytes have no sk_storage. As many as there may be sockets, so
// that no pod's overwrite another's; but those that outlive their pod's enrolment leave theirs to
// be overwritten.
BPF_TABLE("lru_hash", __u64, __u32, arrived, MAX_ARRIVED);

// A sockhash as bcc does not declare it: with lookup, and with the update of sockops programs.
#define SOCKHASH(NAME, KEY, SIZE)                                                                  \
	struct NAME##_sockhash {                                                                   \
		KEY key;                                                                           \
		__u32 leaf;                                                                        \
		struct bpf_sock *(*lookup)(KEY *);                                                 \
		int (*sock_hash_update)(struct bpf_sock_ops *, KEY *, __u64);                      \
		int (*msg_redirect_hash)(struct sk_msg_md *, KEY *, __u64);                        \
		int (*delete)(KEY *);                                                              \
		__u32 max_entries;                                                                 \
		int flags;                                                                         \
	};                                                                                         \
	__attribute__((section("maps/sockhash"))) struct NAME##_sockhash NAME = {.max_entries =    \
										     (SIZE)}

// Socket cookie -> established socket that may be short-circuited; carries the sk_msg program.
SOCKHASH(sockets, __u64, MAX_SOCKETS);
// The sidecar's inbound listening sockets.
SOCKHASH(listeners, struct listener_key, 2 * LISTENER_SLOTS * MAX_PODS);
// Index 0: this datapath and what it found out about the kernel.
BPF_TABLE("array", __u32, struct about, about, 1);

// Kind of connection (a hash, habits.h) -> CLOCK_MONOTONIC until which they count as brief.
BPF_TABLE("array", __u32, __u64, habits, MAX_HABITS);

// Who follows the events: a ring buffer in each slot (redirector/datapath/followers.py). The first
// one only tells the verifier what a slot holds.
BPF_RINGBUF_OUTPUT(no_events, 1);
BPF_ARRAY_OF_MAPS(followers, "no_events", MAX_FOLLOWERS);
// Index 0: the slots in use, one bit each.
BPF_TABLE("array", __u32, __u32, following, 1);
// Slot -> events that found no room there, ever.
BPF_TABLE("array", __u32, __u64, lost_events, MAX_FOLLOWERS);
// Connections from outside that sk_lookup let in while somebody follows -> enum rule; until they
// are accepted.
BPF_TABLE("lru_hash", struct flow_key, __u32, arrivals, 4096);
