// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// Structs and constants shared with Python (redirector/datapath/layout.py). Pure types.
#ifndef REDIRECTOR_LAYOUT_H
#define REDIRECTOR_LAYOUT_H

// Programs of any version whose layout.h and maps.h say the same share their maps. Raise this when
// the same members come to mean something else.
#define LAYOUT_REVISION 1

// IPv4 addresses are kept IPv4-mapped (::ffff:a.b.c.d, RFC 4291 2.5.5.2), so that one key serves
// AF_INET, AF_INET6 and IPv4-mapped sockets alike.
struct address {
	__be32 word[4];
};

struct endpoint {
	struct address ip;
	__u16 port; // host byte order
	__u16 pad;
};

enum side { CLIENT = 0, SERVER = 1 };

// One TCP connection as both of its ends on this node can name it. `netns` is the netns cookie
// where the tuple may repeat in another namespace (loopback, own address), 0 where it cannot.
struct flow_key {
	__u64 netns;
	struct address client;
	struct address server;
	__u16 client_port; // host byte order
	__u16 server_port; // host byte order
	__u32 pad;
};

// A direction is decided before its first byte. It may change once, from REDIRECT to PASS.
enum verdict { UNDECIDED = 0, REDIRECT = 1, PASS = 2 };

// Other versions read the first two.
enum flow_flag {
	FLOW_STEERED = 1,    // has an original destination that a listener will ask for
	FLOW_ANSWERED = 2,   // SO_ORIGINAL_DST has been answered
	FLOW_ACCELERATE = 4, // both ends may enter the sockhash
	FLOW_WATCHED = 8,    // kept only to tell a follower of its end
	FLOW_LEFT = 16,	     // of a socket's state: it has left the sockhash
	FLOW_AGAIN = 32,     // likewise: an earlier connection of the socket has left it there
};

// Who called connect(); all zero when it is not known.
struct process {
	__u32 pid; // of the initial pid namespace
	char comm[16];
};

struct flow {
	__u64 id;		  // cookie of the client's socket: no other flow has it, ever
	struct endpoint original; // where the client wanted to go
	__u32 flags;
	__u64 client_netns; // netns cookie of the pod that opened it
	__u64 opened_ns;    // CLOCK_MONOTONIC
	__u32 unread[2];    // redirected bytes that this side has not read yet, an upper estimate
	__u64 bytes[2];	    // redirected by this side
	__u64 messages[2];
	__u64 drained[2]; // messages that had been redirected to this side when it had read all
	__u64 verdict[2]; // of what this side sends; 64 bits for compare-and-swap
	__u64 socket[2];  // cookies: each side's key in the sockhash, 0 while it is not there
	struct process process;
	__u32 rule;	    // that decided it
	__u32 passed;	    // enum counter: why a side first went to TCP, 0 while none did
	__u32 server_rule;  // that decided it at the server's pod
	__u64 server_netns; // of the server's pod, when it came in there while somebody followed
};

// One connection's flow. Other versions put it together, by `struct about`.
struct flow_name {
	struct flow_key key;
	__u64 id;
};

// Counts of the flows map.
enum room {
	ROOM_TAKEN, // by all pods together
	ROOM_FLOOR, // what each pod may have, whatever the others have
	ROOMS,
};

// What a socket carries with it (sk_storage).
struct sock_state {
	struct flow_key flow;
	__u64 id;   // of the flow
	__u64 peer; // the other end's key in the sockhash, 0 until it is known
	struct endpoint original;
	__u32 side;
	__u32 verdict;	     // once PASS here, the flow need not be asked
	__u32 flags;	     // enum flow_flag
	__u64 leaving_ns;    // when this side began to leave the sockhash, 0: it stays
	__u64 leaving_acked; // bytes that TCP had delivered by then
	__u64 opened_ns;     // CLOCK_MONOTONIC: its SYN left or came
	struct process process;
	__u32 rule;
	__u32 connect_us; // from its SYN to established
	__u32 passed;	  // enum counter: why this side went to TCP, 0 while it has not
	__u32 habit;	  // 1 + the slot that its length is noted in, 0: nowhere
	__u32 pad;
};

enum pod_flag {
	POD_ACCELERATE = 1,
	POD_INCLUDE_ALL_V4 = 2,
	POD_INCLUDE_ALL_V6 = 4,
	POD_HAS_CIDRS = 8,	  // look into the cidrs trie
	POD_HAS_PORTS = 16,	  // look into the members map for ports
	POD_INBOUND_LIST = 32,	  // only listed inbound ports are captured
	POD_GROUP_LIST = 64,	  // only listed groups are captured
	POD_GROUP_EXCLUDED = 128, // look into the members map for excluded groups
	POD_DNS = 256,		  // capture DNS, of the resolvers in the cidrs trie ...
	POD_DNS_ANY = 512,	  // ... or of anybody
	POD_INTERFACES = 1024,	  // some interfaces are excluded
	POD_REPEATED = 2048,	  // other pods have some of its addresses, too
	// Connections steered by an older generation may be on their way, their flows in its map.
	POD_TAKEOVER = 1 << 16,
};

// Which rule decided a connection: the tables of redirector/steering.py, in their order.
enum rule {
	RULE_OUTBOUND_EXCLUDED_INTERFACE,
	RULE_OUTBOUND_EXCLUDED_PORT,
	RULE_OUTBOUND_PASSTHROUGH,
	RULE_OUTBOUND_PROXY_TUNNEL,
	RULE_OUTBOUND_PROXY_SELF,
	RULE_OUTBOUND_PROXY_UID,
	RULE_OUTBOUND_PROXY_GID,
	RULE_OUTBOUND_EXCLUDED_GROUP,
	RULE_OUTBOUND_GROUP_NOT_INCLUDED,
	RULE_OUTBOUND_DNS,
	RULE_OUTBOUND_NOT_TCP,
	RULE_OUTBOUND_APP_LOCAL,
	RULE_OUTBOUND_EXCLUDED_CIDR,
	RULE_OUTBOUND_INCLUDED_PORT,
	RULE_OUTBOUND_INCLUDED_CIDR,
	RULE_OUTBOUND_NOT_INCLUDED,
	RULE_INBOUND_NOT_TCP,
	RULE_INBOUND_EXCLUDED_INTERFACE,
	RULE_INBOUND_KUBEVIRT_INCLUDED,
	RULE_INBOUND_KUBEVIRT,
	RULE_INBOUND_TUNNEL_PORT,
	RULE_INBOUND_EXCLUDED_PORT,
	RULE_INBOUND_INCLUDED_PORT,
	RULE_INBOUND_NOT_INCLUDED,
	RULES,
};

#define MAX_PROXY_IDS 4
#define TUNNEL_PORT 15008 // HBONE: the sidecar's own, never captured
#define DNS_PORT 53

struct pod {
	struct address ip4; // mapped; all zero when the pod has none
	struct address ip6;
	__u32 proxy_uid[MAX_PROXY_IDS];
	__u32 proxy_gid[MAX_PROXY_IDS];
	__u32 proxy_uids; // how many are set
	__u32 proxy_gids;
	__u32 flags;
	__be32 host_loopback; // IPv4 range that is always direct, ...
	__be32 host_loopback_mask;
	__u16 outbound_port;
	__u16 inbound_port;
	__u16 dns_port;
	__u16 pad;
};

// Sidecars that share their port (SO_REUSEPORT) while one takes over from another, and workers of
// one: any of them may go first.
#define LISTENER_SLOTS 4

struct listener_key {
	__u64 netns;
	__u32 family; // of the socket: AF_INET, or AF_INET6, which may serve IPv4 too
	__u32 slot;
};

// Each twice: IPv6 ranges with CIDR_V6, since some of them hold the mapped addresses.
enum cidr_set {
	CIDR_INCLUDE = 0,
	CIDR_EXCLUDE = 1,
	CIDR_RESOLVER = 2,
	CIDR_ROUTE = 3, // the main routing table
	CIDR_OWN = 4,	// the pod's own addresses that others may have: link-local, repeated
	CIDR_V6 = 16,
};

enum cidr_value {
	CIDR_LISTED = 1,
	CIDR_IN_LOOPBACK = 2,
	CIDR_BY_EXCLUDED = 3, // routed through an excluded interface
};

// Longest-prefix key: 96 bits name the pod and the set, then the mapped address.
struct cidr_key {
	__u32 prefixlen;
	__u32 netns_low;
	__u32 netns_high;
	__u32 set;
	struct address ip;
};

// Sets of numbers: ports, groups, interfaces.
enum member_set {
	OUTBOUND_PORT_INCLUDE = 0,
	OUTBOUND_PORT_EXCLUDE = 1,
	INBOUND_PORT_INCLUDE = 2,
	INBOUND_PORT_EXCLUDE = 3,
	GROUP_INCLUDE = 4,
	GROUP_EXCLUDE = 5,
	INTERFACE_EXCLUDE = 6, // by index
};

struct member_key {
	__u64 netns;
	__u32 value;
	__u32 set;
};

// Named counters of a pod; the names are the metric's `reason` labels.
enum counter {
	STEERED_OUTBOUND,
	STEERED_INBOUND,
	STEERED_SELF,	  // the proxy called its own pod
	STEERED_DNS,	  // connections, and queries of unconnected sockets
	ACCELERATED,	  // sockets put into the sockhash
	REDIRECTED_BYTES, // of connections that have closed; open ones: the flows map
	REDIRECTED_MESSAGES,
	PASSED_NO_PEER,	    // direction on plain TCP: the peer was not in the sockhash
	PASSED_UNREAD,	    // direction on plain TCP: the reader left too much unread
	PASSED_MEMORY,	    // direction on plain TCP: the node's memory for TCP is short
	PASSED_LEFT,	    // direction on plain TCP: the other end streams, it leaves the sockhash
	PASSED_FAST_OPEN,   // socket left alone: data went with the SYN
	PASSED_FULL,	    // socket left alone: no room in the sockhash
	PASSED_NO_SHARE,    // connection left alone: its pod has as many flows as it may have
	PASSED_UNSUPPORTED, // socket left alone: of a kind that the sockhash does not take (MPTCP)
	PASSED_ZEROCOPY,    // socket left alone: it wants to be told when its bytes are sent
	PASSED_BRIEF,	    // connection left alone: those like it have been brief lately
	WITHHELD_KTLS, // an option that a socket of the sockhash is not given: TLS in the kernel
	WITHHELD_ZEROCOPY, // likewise SO_ZEROCOPY
	REFUSED_NO_STATE,  // connect refused: its original destination could not be kept
	REFUSED_NO_FLOW, // came to a sidecar's port without an original destination; sk_lookup also
			 // asks for a stray segment of a closed connection, and counts it here
	REFUSED_NO_SHARE,    // SYN refused: its pod has as many flows as it may have
	REFUSED_NO_LISTENER, // SYN refused: the sidecar does not listen
	COUNTERS,
};

// What became of a connection that took time to establish.
enum connect_kind { CONNECT_STEERED, CONNECT_DIRECT, CONNECT_KINDS };

#define CONNECT_BUCKETS 26

// Time from SYN to established. Bucket b counts up to 2^b us, and what no smaller one did; the last
// one all that took longer.
struct latency {
	__u64 bucket[CONNECT_BUCKETS];
	__u64 total_us;
};

struct counters {
	__u64 value[COUNTERS];
	__u64 rule[RULES]; // connections that each rule decided
	struct latency connect[CONNECT_KINDS];
};

enum event_kind { EVENT_OPEN = 1, EVENT_CLOSE = 2, EVENT_FAILED = 3, EVENT_REFUSED = 4 };

// What a follower reads from its ring buffer.
struct event {
	__u64 at_ns; // CLOCK_MONOTONIC, as all times here
	__u64 opened_ns;
	__u64 id;    // cookie of the socket: one connection's events have the same
	__u64 netns; // netns cookie of the pod
	__u64 sent;  // by the pod's side of the connection, redirected or delivered by TCP
	__u64 received;
	__u64 redirected; // both ways
	struct endpoint client;
	struct endpoint server; // where the client wanted to go
	struct process process;
	__u32 connect_us;
	__u32 flags; // enum flow_flag
	__u16 rule;  // that decided it
	__u8 kind;   // enum event_kind
	__u8 reason; // enum counter: why it was refused or went to TCP
	__u32 sides; // of its ends, how many entered the sockhash
	__u32 pad;
};

#define MAX_FOLLOWERS 8

// What the running kernel does wrong with redirected bytes; found by trying, at load
// (redirector/datapath/selftest.py says what each means).
enum defect {
	DEFECT_FIONREAD = 1,
	DEFECT_UNREAD = 2,
	DEFECT_REDIRECT = 4,
	DEFECT_ORDER = 8,
	DEFECT_FIONREAD_PASSED = 16,
	DEFECT_HALF_CLOSE = 32,
	DEFECT_CLOSE = 64,
	DEFECT_STALLED = 128,
	DEFECT_EPOLL = 256,
	DEFECT_PEEK = 512,
	DEFECT_SENDFILE = 1024,
	DEFECT_SPLICE_IN = 2048,
	DEFECT_SPLICE_OUT = 4096,
	DEFECT_ZEROCOPY = 8192,
	DEFECT_SEAM = 16384,
	DEFECT_OVERLAP = 32768,
};

// Read by other versions, too: new members go to the end, and none ever changes.
struct about {
	__u8 sha256[32]; // of the source and constants that this datapath was compiled from
	__u32 defects;
	__u16 flow_key_netns; // offsets in struct flow_key, ...
	__u16 flow_key_server;
	__u16 flow_client_netns; // ... and in struct flow
	__u16 flow_flags;
	__u16 flow_id;
	__u16 pad;
};

#endif
