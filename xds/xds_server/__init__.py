"""The control plane: Kubernetes objects in, Envoy configuration out."""
