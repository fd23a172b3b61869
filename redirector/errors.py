"""What can go wrong, as a tree.

RedirectorError            one clear line for the user; the CLI prints it and exits non-zero
├── InputError             a name, option, file or object the user gave is wrong (exit 2)
│   ├── AlreadyEnrolled
│   └── NotEnrolled
├── MachineError           this machine or kernel lacks something: root, bpffs, cgroup2 (exit 3)
├── DatapathError          the kernel refused a program, map, link or rule (exit 4)
└── ClusterError           the Kubernetes API server does not answer, or says no (exit 5)

Errors of foreign libraries are translated at the border of the room that calls them.
"""


class RedirectorError(Exception):
    """The base: its text names the object, the field, the value and the way out."""

    exit_code = 1


class InputError(RedirectorError):
    """The user gave something that cannot be used."""

    exit_code = 2


class AlreadyEnrolled(InputError):  # noqa: N818 - reads as the state it reports
    """A pod of this name is enrolled already."""


class NotEnrolled(InputError):  # noqa: N818
    """No pod of this name is enrolled."""


class MachineError(RedirectorError):
    """This machine lacks what the datapath needs."""

    exit_code = 3


class DatapathError(RedirectorError):
    """The kernel refused a program, a map, a link or a rule."""

    exit_code = 4


class ClusterError(RedirectorError):
    """The Kubernetes API server does not answer, or says no."""

    exit_code = 5
