// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Room in the flows map, and who may take it. A pod may always have its floor: half of the map,
// divided by the pods. The other half is common: beyond its floor, a pod may have as much as it
// leaves to others. So pods that take what they can get have a half, a quarter, an eighth of it,
// and nobody is ever refused below the floor.
//
// A flow and its place in the counts come and go together, here and nowhere else; what is not a
// program deletes flows by `forget`.

ALWAYS __s64 *room_of(__u32 which)
{
	return room.lookup(&which);
}

// `open` is the pod's entry in `shares`.
ALWAYS bool has_room(const __s64 *open, bool steered)
{
	__s64 *taken = room_of(ROOM_TAKEN);
	__s64 *floor = room_of(ROOM_FLOOR);
	__s64 own, all;

	if (!open || !taken || !floor)
		return false;
	own = *(volatile __s64 *)open;
	all = *(volatile __s64 *)taken;
	// What can do without a flow leaves half of the pod's room to what cannot: its own count
	// twice.
	if (!steered) {
		all += own;
		own += own;
	}
	return own < *floor || own + all < MAX_FLOWS / 2;
}

// False when there was none.
ALWAYS bool drop_flow(struct flow_key *key, __u64 netns)
{
	__s64 *taken = room_of(ROOM_TAKEN);
	__s64 *open = shares.lookup(&netns);
	int failed;

	failed = flows.delete(key);
	if (failed)
		return false;
	if (open)
		__sync_fetch_and_add(open, -1);
	if (taken)
		__sync_fetch_and_add(taken, -1);
	return true;
}

// Answers 0, or why there is no flow now: enum counter.
ALWAYS __u32 keep_flow(struct flow_key *key, struct flow *flow)
{
	bool steered = flow->flags & FLOW_STEERED;
	__u64 netns = flow->client_netns;
	__s64 *taken = room_of(ROOM_TAKEN);
	__s64 *open = shares.lookup(&netns);
	struct flow *other;
	int failed;

	if (!has_room(open, steered))
		return steered ? REFUSED_NO_SHARE : PASSED_NO_SHARE;
	failed = flows.insert(key, flow);
	if (failed == -EEXIST) {
		// Of a connection whose end nobody told us of.
		other = flows.lookup(key);
		if (other)
			drop_flow(key, other->client_netns);
		failed = flows.insert(key, flow);
	}
	if (failed)
		return PASSED_FULL;
	if (open)
		__sync_fetch_and_add(open, 1);
	if (taken)
		__sync_fetch_and_add(taken, 1);
	return 0;
}

// Called by redirector/datapath/forgetting.py; 1: the flow was there, and is no more.
int redirector_forget(struct flow_name *name)
{
	struct flow_key key = name->key;
	__u64 id = name->id;
	struct flow *flow = flows.lookup(&key);

	// Another connection may have its tuple by now.
	return flow && flow->id == id && drop_flow(&key, flow->client_netns);
}
