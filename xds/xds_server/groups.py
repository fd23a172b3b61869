"""The API groups of objects that are not Kubernetes' own. Pure."""

GATEWAY_GROUP = "gateway.networking.k8s.io"
POLICY_GROUP = "policy.redirector.io"
POLICY_VERSION = f"{POLICY_GROUP}/v1alpha1"


def is_policy(api_version: object) -> bool:
    """Whether an apiVersion, whatever stands there, is of the group of our own policies."""
    return isinstance(api_version, str) and api_version.split("/")[0] == POLICY_GROUP
