"""The demonstration: real pods, real Envoys, the real control plane and datapath, and a show of it.

Every check is one that can fail. What it makes carries a random name and is gone afterwards.
"""

from redirector.demo.command import add_arguments, run

__all__ = ["add_arguments", "run"]
