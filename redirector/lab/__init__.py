"""A small node made by hand: pods as network namespaces on a bridge, each with its cgroups."""

from redirector.lab.node import LabPod, Node

__all__ = ["LabPod", "Node"]
