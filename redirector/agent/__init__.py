"""The node's agent: keeps the pods of a node steered as Kubernetes asks for it."""
