"""A Kubernetes object as it was read: untyped still, but with its origin."""

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class KubeObject:
    """`data` is the decoded document (anything YAML can say under string keys); `file` is where it
    stood, for messages."""

    file: str
    data: dict[str, object]
