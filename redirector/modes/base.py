"""What every mode can do with a pod. The decisions themselves are in `redirector.steering`."""

from collections.abc import Sequence
from typing import Protocol

from redirector.model import Mode, Pod
from redirector.status import Tally

#: How long a sidecar gets, while its pod is released, to answer questions that nobody can count.
DNS_GRACE_SECONDS = 0.1


class ModeDriver(Protocol):
    """Puts a pod's traffic on its sidecar and takes it off again; holds no state of its own.

    `had` are other forms of the pod, as earlier calls may have left it, whole or interrupted: what
    they had and it has not is removed.
    """

    mode: Mode

    def install(self, pod: Pod, had: Sequence[Pod] = ()) -> None:
        """Steer the pod's new connections; open ones go on as they are.

        A second call changes nothing. All or nothing: DatapathError leaves what was there before.
        """

    def remove(self, pod: Pod, had: Sequence[Pod] = ()) -> None:
        """Make the pod's new connections direct at once; open ones go on as they are.

        A pod that is not installed, or whose network namespace is gone, is no error.
        """

    def missing(self, pod: Pod) -> list[str]:
        """Name what should be in the kernel for this pod and is not; [] when it is whole."""

    def tallies(self, pod: Pod) -> tuple[Tally, ...]:
        """What this mode has counted of the pod's connections since it was installed."""
