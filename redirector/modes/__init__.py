"""The ways a pod's traffic can reach its sidecar; each is a `ModeDriver`."""
