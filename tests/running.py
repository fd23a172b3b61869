"""Real processes for the end-to-end tests: the xDS server as users start it, Envoy as sidecar."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from waiting import PATIENCE_S, eventually

from redirector.bootstrap import XdsTls, bootstrap
from redirector.lab import LabPod
from redirector.machine import envoy_binary

#: The demo's objects.
DEMO = Path(__file__).parents[1] / "manifests" / "demo"
#: The sidecar's user, from the product's defaults.
SIDECAR_ID = 1337

_GET = """
import sys, urllib.request
sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())
"""


class XdsServer:
    """`xds-server`, listening on a Unix socket and a loopback port. `source`: a directory of
    manifests, or options that name another source; `popen` starts it in another place than here."""

    def __init__(
        self,
        place: Path,
        source: Path | Sequence[str],
        *options: str | Path,
        popen: Callable[..., "subprocess.Popen[Any]"] = subprocess.Popen,
    ) -> None:
        self.socket = place / "xds.sock"
        self.events_file = place / "events.jsonl"
        self._log_file = place / "server.log"
        self._log_start = self._log_file.stat().st_size if self._log_file.exists() else 0
        command: list[str | Path] = [
            Path(sys.executable).with_name("xds-server"),
            *(["--manifests", str(source)] if isinstance(source, Path) else source),
        ]
        command += ["--listen", f"unix:{self.socket}", "--listen", "127.0.0.1:0"]
        command += ["--events", self.events_file, "--log-level", "debug", *options]
        with self._log_file.open("ab") as log:
            self.process = popen(command, stdout=log, stderr=log)
        self.wait_for_log(r"serving")

    @property
    def port(self) -> int:
        """The loopback port."""
        return int(self.wait_for_log(r"listening on 127\.0\.0\.1:(\d+)")[1])

    @property
    def log(self) -> str:
        """What this server (not one before it) has said."""
        return self._log_file.read_bytes()[self._log_start :].decode()

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        """The first match, once the server has said it."""

        def probe() -> re.Match[str] | None:
            found = re.search(pattern, self.log)
            assert found or self.process.poll() is None, f"xds-server ended:\n{self.log}"
            return found

        return eventually(f"{pattern!r} in:\n{self.log}", probe)

    def events(self) -> list[dict[str, Any]]:
        """The reports of all pushes so far, also of servers before."""
        return [json.loads(line) for line in self.events_file.read_text().splitlines()]

    def event_after(self, action: Callable[[], object]) -> dict[str, Any]:
        """The first report of a push after `action`."""
        before = len(self.events())
        action()
        found = eventually("an event", lambda: self.events()[before:])
        return found[0]

    def sent(self) -> list[str]:
        """What was sent with resources in it, as the log tells: `route: 1 (outbound|80|...)`."""
        return [
            f"{kind}: {rest}"
            for kind, rest in re.findall(r" sent \d+ \((\w+)\): (\d.*),", self.log)
        ]

    def stop(self) -> int:
        """End it as a service manager does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


class Sidecar:
    """A real Envoy in a pod, as the sidecar's user, with the product's bootstrap.

    `changed` is merged into the bootstrap's ads_config, for clients that differ from ours, and
    `more` into the bootstrap.
    """

    def __init__(
        self,
        pod: LabPod,
        place: Path,
        name: str,
        namespace: str,
        xds: str,
        changed: dict[str, Any] | None = None,
        tls: XdsTls | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        self._pod = pod
        self.name = name
        config = place / f"{pod.name}.json"
        admin = place / f"{pod.name}-admin"
        content: dict[str, Any] = bootstrap(name, namespace, pod.ip, xds=xds, admin_port=0, tls=tls)
        content["dynamic_resources"]["ads_config"].update(changed or {})
        content.update(more or {})
        config.write_text(json.dumps(content))
        admin.mkdir(mode=0o700)
        os.chown(admin, SIDECAR_ID, SIDECAR_ID)
        #: A folder that Envoy may write to.
        self.folder = admin
        self._log_file = place / f"{pod.name}.log"
        command: list[str | Path] = [
            envoy_binary(),
            "-c",
            config,
            "--admin-address-path",
            admin / "address",
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "--log-level",
            "warning",
        ]
        with self._log_file.open("wb") as log:
            self.process = pod.popen(command, sidecar=True, stdout=log, stderr=log)
        eventually("Envoy's admin address", lambda: (admin / "address").exists() or self._dead())
        self._admin = eventually("an address", (admin / "address").read_text)

    def log(self) -> str:
        """All that Envoy has written, on both of its outputs."""
        return self._log_file.read_text()

    def _dead(self) -> bool:
        assert self.process.poll() is None, f"Envoy ended:\n{self.log()}"
        return False

    def admin(self, path: str) -> str:
        """The admin interface's answer, asked from inside the pod."""
        url = f"http://{self._admin}{path}"
        done = self._pod.run([sys.executable, "-S", "-c", _GET, url], check=True)
        return str(done.stdout)

    def dump(self, kind: str, field: str) -> list[Any]:
        """A field's entries in all parts of /config_dump whose type's name ends with `kind`."""
        configs = json.loads(self.admin("/config_dump?include_eds"))["configs"]
        parts = [part for part in configs if part["@type"].endswith(f".{kind}")]
        assert parts, f"Envoy shows no {kind}"
        return [entry for part in parts for entry in part.get(field, [])]

    def listeners(self) -> list[str]:
        """The names of the active listeners."""
        found = self.dump("ListenersConfigDump", "dynamic_listeners")
        return sorted(entry["name"] for entry in found if "active_state" in entry)

    def clusters(self) -> list[str]:
        """The names of the clusters that are warm."""
        found = self.dump("ClustersConfigDump", "dynamic_active_clusters")
        return sorted(entry["cluster"]["name"] for entry in found)

    def warming(self) -> list[str]:
        """The names of the clusters that still wait for something."""
        found = self.dump("ClustersConfigDump", "dynamic_warming_clusters")
        return sorted(entry["cluster"]["name"] for entry in found)

    def routes(self) -> dict[str, Any]:
        """The route configurations by name."""
        found = self.dump("RoutesConfigDump", "dynamic_route_configs")
        return {entry["route_config"]["name"]: entry["route_config"] for entry in found}

    def endpoints(self) -> dict[str, list[str]]:
        """The addresses of each EDS cluster."""
        found = self.dump("EndpointsConfigDump", "dynamic_endpoint_configs")
        configs = (entry["endpoint_config"] for entry in found)
        return {
            config["cluster_name"]: [
                "{address}:{port_value}".format(**e["endpoint"]["address"]["socket_address"])
                for group in config.get("endpoints", [])
                for e in group.get("lb_endpoints", [])
            ]
            for config in configs
        }
