"""What Kubernetes wants of this node: objects read, watched and judged; pods found on the node."""
