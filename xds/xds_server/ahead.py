"""What is told first of a change: policies, before the Service whose pods they are for. Pure."""

from dataclasses import replace

from xds_server.ir import Mesh, Name


def policies_ahead(old: Mesh, new: Mesh) -> Mesh | None:
    """The state to go through on the way to the new one: its policies with the Services of before.

    A policy may be older than the Service that it is for. The pods of that Service are known by the
    Service alone, so they come under the policy in the same change in which clients learn of it;
    their sidecars have to take it before anybody is led there. None when there is no need.
    """
    if new.services.keys() <= old.services.keys() or _held(new) <= _held(old):
        return None
    return replace(new, services=old.services, routes=old.routes)


def _held(mesh: Mesh) -> set[tuple[Name, Name]]:
    """Each policy with each of the pods that it names."""
    return {(policy.name, pod) for policy in mesh.policies for pod in policy.targets or ()}
