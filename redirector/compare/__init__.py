"""The latency comparison: every way from an application to its sidecar, side by side in one run."""

from redirector.compare.command import add_arguments, run

__all__ = ["add_arguments", "run"]
