"""What the control plane costs, for its makers: `make bench-xds`."""
