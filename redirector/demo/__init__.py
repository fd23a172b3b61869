"""The demonstration: real pods, real Envoys, the real control plane and datapath, and a show of it.

Every check is one that can fail. What it makes carries a random name and is gone afterwards. The
command is in `command`; nothing is imported here, because the pods' programs start from here too.
"""
