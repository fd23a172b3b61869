// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What connections of a kind use to be: those of one program of a pod to one destination. Entering
// and leaving the sockhash costs a connection about what one request and its reply win by it, and
// the kernel destroys its part of it later, in a worker. Where brief connections follow each other
// fast, the next ones are left out of it.

// In all, both ways: a request and its reply.
#define BRIEF_MESSAGES 2
// A brief connection counts for BRIEF_NS, and this much of it makes the next ones brief: 64 of them
// within a moment, then a thousand a second. Below that, what is lost is not worth a connection
// that turns out to be long.
#define BRIEF_ENOUGH (64ULL * BRIEF_NS)
// As long after the last one, connections are taken for long again.
#define BRIEF_MOST (2 * BRIEF_ENOUGH)

ALWAYS __u64 stir(__u64 hash, __u64 value)
{
	return (hash ^ value) * 0x9e3779b97f4a7c15ULL; // 2^64 / golden ratio (Knuth 6.4)
}

// Which slot of `habits` tells of connections like this one. Others may share it: they are judged
// together then, and whatever comes of it is right, only slower.
ALWAYS __u32 habit_of(const struct sock_state *state, __u64 netns)
{
	bool steered = state->flags & FLOW_STEERED;
	const __u32 *comm = (const __u32 *)state->process.comm;
	__u64 hash = stir(netns, steered ? state->original.port : state->flow.server_port);

#pragma unroll
	for (int i = 0; i < 4; i++) {
		hash =
		    stir(hash, steered ? state->original.ip.word[i] : state->flow.server.word[i]);
		hash = stir(hash ^ hash >> 32, comm[i]);
	}
	return hash >> 32 & (MAX_HABITS - 1);
}

ALWAYS bool are_brief(__u32 habit, __u64 now)
{
	__u64 *until = habits.lookup(&habit);

	return until && *until > now + BRIEF_ENOUGH;
}

// One of them has closed. Ends that close at the same time may overwrite each other's note: it is
// a guess in any case.
ALWAYS void note_habit(__u32 habit, __u64 messages, __u64 now)
{
	__u64 *until = habits.lookup(&habit);

	if (!until)
		return;
	if (messages > BRIEF_MESSAGES)
		*until = 0;
	else if (*until < now)
		*until = now + BRIEF_NS;
	else if (*until < now + BRIEF_MOST)
		*until += BRIEF_NS;
}
