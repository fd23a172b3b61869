"""The iptables mode: the decisions of `redirector.steering` as NAT rules in the pod's netns.

The rules are data (`rules`); the driver compares them with what the kernel has (`transaction`) and
commits the difference, one transaction for IPv4 and one for IPv6 (`programs`).

Only a connection's SYN meets the rules. conntrack picks up streams in their middle
(nf_conntrack_tcp_loose), and a REDIRECT of one that was opened without us would break it.
"""
