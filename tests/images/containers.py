"""Containers of the built images, as the manifests' pods describe them."""

import contextlib
import os
import resource
import secrets
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployed import Deployed
from waiting import PATIENCE_S, eventually

from redirector.lab import LabPod, Node
from redirector.lab.node import NETNS_DIRECTORY
from redirector.network import within

#: What tests/images/setup made; podman with the images' storage.
PODMAN = Path(os.environ.get("REDIRECTOR_IMAGES", "/var/lib/redirector/images")) / "podman"
AGENT_IMAGE, XDS_IMAGE = "localhost/redirector:test", "localhost/redirector-xds-server:test"
#: As mounted into each pod by its kubelet.
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


@dataclass(frozen=True)
class Places:
    """What stands for things of the cluster here."""

    #: Volume -> the directory or file to mount in its stead.
    volumes: Mapping[str, Path] = field(default_factory=dict)
    #: Beside what the manifest sets.
    environment: Mapping[str, str] = field(default_factory=dict)
    #: What the pod's fields are, such as `spec.nodeName`.
    fields: Mapping[str, str] = field(default_factory=dict)
    #: With the account's token and ca.crt.
    account: Path | None = None


class Container:
    """One that runs; made by `start`."""

    def __init__(
        self, name: str, process: "subprocess.Popen[str]", log: Path, pod: LabPod, node: Node
    ) -> None:
        self.name = name
        self.process = process
        self.log = log
        self._pod = pod
        self._kubelet = NETNS_DIRECTORY / node.name

    def ask(self, port: int, path: str, address: str = "") -> tuple[int, str]:
        """What its HTTP endpoint answers the node, asked by the pod's IPv4 address or another of
        its; 0 while nobody listens."""

        def get() -> tuple[int, str]:
            url = f"http://{address or self._pod.ip}:{port}{path}"
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except urllib.error.URLError:
                return 0, ""

        assert self.process.poll() is None, self.log.read_text()
        return within(self._kubelet, get)

    def until_probed(self, given: Deployed) -> None:
        """Wait until the manifest's probes, asked as the kubelet does, are answered well, and on an
        IPv6 address as well; so is each of its ports."""
        container = given.container()
        self.until_answering(container, "startupProbe", "livenessProbe", "readinessProbe")
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        asks = container["readinessProbe"]["httpGet"]
        assert self.ask(ports[asks["port"]], asks["path"], f"[{self._pod.ip6}]")[0] == 200
        for port in ports.values():
            for address in (self._pod.ip, self._pod.ip6):
                within(
                    self._kubelet,
                    lambda: socket.create_connection((address, port), PATIENCE_S).close(),  # noqa: B023
                )

    def until_answering(self, container: Mapping[str, Any], *probes: str) -> None:
        """Wait until these probes of the container are answered well."""
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in probes:
            asks = container[probe]["httpGet"]
            port, path = ports[asks["port"]], asks["path"]
            eventually(f"{probe} ({self.log})", lambda: self.ask(port, path)[0] == 200)  # noqa: B023

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """`kubectl exec`."""
        return podman("exec", self.name, *words)

    @property
    def pid(self) -> int:
        """Of its first process, on this machine; 0 before it is there and once it has ended."""
        inspected = podman("inspect", "--format={{.State.Pid}}", self.name)
        return int(inspected.stdout) if inspected.returncode == 0 else 0

    @property
    def out_of_memory(self) -> bool:
        """Whether its limit has killed any of it."""
        return podman("inspect", "--format={{.State.OOMKilled}}", self.name).stdout != "false\n"

    def stop(self, given: Deployed) -> int:
        """As the kubelet does; its exit code. 137 when its grace period was not enough."""
        grace = given.pod()["terminationGracePeriodSeconds"]
        podman("stop", "--time", str(grace), self.name)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL, and forget it."""
        podman("rm", "--force", "--time", "0", self.name)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_S)


def podman(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run podman to its end."""
    return subprocess.run([PODMAN, *words], capture_output=True, text=True, timeout=PATIENCE_S)


def flags(given: Deployed, places: Places) -> list[str]:
    """The options of `podman run` that make a container what the manifest says."""
    return container_flags(given.pod(), given.container(), places)


def container_flags(
    pod: Mapping[str, Any], container: Mapping[str, Any], places: Places
) -> list[str]:
    """The same for any container of any pod."""
    context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
    # What the kubelet asks of the runtime without being told.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    made = [f"--ulimit=nofile={limit}:{limit}", "--ulimit=nproc=10000:10000"]
    made += [
        "--read-only-tmpfs=false",
        f"--read-only={context.get('readOnlyRootFilesystem', False)}",
    ]
    if "runAsUser" in context:
        made.append(f"--user={context['runAsUser']}:{context.get('runAsGroup', 0)}")
    if "fsGroup" in context:
        made.append(f"--group-add={context['fsGroup']}")
    if context.get("allowPrivilegeEscalation") is False:
        made.append("--security-opt=no-new-privileges")
    if context.get("appArmorProfile", {}).get("type") == "Unconfined":
        made.append("--security-opt=apparmor=unconfined")
    capabilities = context.get("capabilities", {})
    made += [f"--cap-drop={name}" for name in capabilities.get("drop", [])]
    made += [f"--cap-add={name}" for name in capabilities.get("add", [])]
    if pod.get("hostPID"):
        made.append("--pid=host")
    if "resources" in container:
        limit = container["resources"]["limits"]["memory"].removesuffix("i").lower()
        made += [f"--memory={limit}", f"--memory-swap={limit}"]
    for each in container.get("env", []):
        value = each.get("value") or places.fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
        made.append(f"--env={each['name']}={value}")
    made += [f"--env={name}={value}" for name, value in places.environment.items()]
    volumes = {each["name"]: each for each in pod.get("volumes", [])}
    for mount in container.get("volumeMounts", []):
        made.append(_volume(volumes[mount["name"]], mount, places))
    if places.account is not None:
        made.append(f"--volume={places.account}:{ACCOUNT}:ro")
    return made


def _volume(volume: Mapping[str, Any], mount: Mapping[str, Any], places: Places) -> str:
    where, source = mount["mountPath"], places.volumes.get(volume["name"])
    if source is None and "emptyDir" in volume:
        assert volume["emptyDir"]["medium"] == "Memory"
        size = volume["emptyDir"]["sizeLimit"].removesuffix("i").lower()
        return f"--tmpfs={where}:size={size},mode=777"
    source = source or Path(volume["hostPath"]["path"])
    if volume.get("hostPath", {}).get("type") == "FileOrCreate":
        source.touch()
    return f"--volume={source}:{where}{':ro' if mount.get('readOnly') else ''}"


def start(
    node: Node, pod: LabPod, image: str, options: Sequence[str], words: Sequence[str], log: Path
) -> Container:
    """Run `words` in a container of the image, in the network of the node's pod."""
    name = f"{pod.name}-{secrets.token_hex(3)}"
    argv = [PODMAN, "run", "--rm", f"--name={name}", f"--network=ns:{pod.netns}", *options, image]
    with log.open("w") as file:
        process = subprocess.Popen([*argv, *words], stdout=file, stderr=file, text=True)
    return Container(name, process, log, pod, node)


def run_to_end(
    pod: LabPod, image: str, options: Sequence[str], *words: str
) -> "subprocess.CompletedProcess[str]":
    """The same, for a command that ends by itself."""
    return podman("run", "--rm", f"--network=ns:{pod.netns}", *options, image, *words)
