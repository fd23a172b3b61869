"""What the folders of manifests/ give to a cluster."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Deployed:
    """One of the folders; `workload` is the kind that runs its only container."""

    name: str
    workload: str

    def objects(self) -> Iterator[dict[str, Any]]:
        """Every object, in the files' order."""
        directory = Path(__file__).parents[1] / "manifests" / self.name
        for path in sorted(directory.glob("*.yaml")):
            yield from yaml.safe_load_all(path.read_text())

    def one(self, kind: str) -> dict[str, Any]:
        """The only object of its kind."""
        (found,) = (each for each in self.objects() if each["kind"] == kind)
        return found

    def pod(self) -> dict[str, Any]:
        """The spec of the workload's pods."""
        spec: dict[str, Any] = self.one(self.workload)["spec"]["template"]["spec"]
        return spec

    def container(self) -> dict[str, Any]:
        """Its container."""
        (found,) = self.pod()["containers"]
        return dict(found)

    def allowed(self) -> set[tuple[str, str]]:
        """(verb, resource) of all that the ClusterRole grants; resources beyond the core group are
        `GROUP/NAME`."""
        return {
            (verb, f"{group}/{resource}".lstrip("/"))
            for rule in self.one("ClusterRole")["rules"]
            for group in rule["apiGroups"]
            for verb in rule["verbs"]
            for resource in rule["resources"]
        }

    def capabilities(self) -> list[str]:
        """The capabilities that the container keeps."""
        kept = self.container()["securityContext"]["capabilities"]
        assert kept["drop"] == ["ALL"]
        return list(kept.get("add", ()))


AGENT = Deployed("agent", "DaemonSet")
XDS_SERVER = Deployed("xds-server", "Deployment")
