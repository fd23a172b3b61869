"""The Kubernetes API server, for whoever follows it: its REST interface, and tables kept by it.

Shared by the agent and the control plane; knows nothing of what the objects mean.
"""
