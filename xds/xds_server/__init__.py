"""The control plane: Kubernetes objects in, Envoy configuration out."""

import os

# Of gRPC's two engines for a server's sockets the older one, which hands a message over between
# fewer threads: a change reaches a thousand sidecars in little more than half the time. gRPC reads
# this while it is imported, and passes over a name that it does not know.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
