"""Where Kubernetes objects come from."""
