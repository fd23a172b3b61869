"""Steps 1 to 3: the node, the control plane, the enrollment."""

import json
import time
from functools import partial
from typing import Any

from redirector.datapath.hooks import ALL_HOOKS
from redirector.demo.console import Console
from redirector.demo.world import (
    ADDRESSES,
    ADMIN_PORT,
    CLIENT,
    ENROLLED,
    PLAIN,
    WEBS,
    World,
)
from redirector.lab.node import SIDECAR_ID
from redirector.model import Accelerate, Mode
from redirector.status import PodStatus, defect_names

_READY_STATS = {
    "listener_manager.total_listeners_active": "listeners",
    "cluster_manager.active_clusters": "clusters",
}


def lay_out(world: World, console: Console) -> None:
    """Pods, applications, sidecars that wait for their configuration."""
    console.say("Pods are network namespaces on a bridge; application and sidecar of each have a")
    console.say("cgroup of their own. Service addresses lead nowhere until somebody steers.")
    console.waiting("making four pods")
    started = time.monotonic()
    world.make_pods()
    console.check(len(world.pods) == 4, "four pods on a bridge", _since(started))
    console.waiting("starting two web servers")
    started = time.monotonic()
    world.start_apps()
    console.check(True, "web-v1 and web-v2 serve HTTP on port 8080", _since(started))
    console.waiting("starting three Envoys")
    started = time.monotonic()
    world.start_sidecars()
    info = json.loads(world.admin(CLIENT, "/server_info") or "{}")
    version = info["version"].split("/")[1]
    console.check(
        info["state"] != "LIVE",
        f"Envoy {version} in three of them, waiting for its configuration",
        _since(started),
    )
    console.table(
        ("pod", "address", "runs"),
        [(name, address, _runs(name)) for name, address in ADDRESSES.items()],
    )
    uids = {world.uid(name) for name in ENROLLED}
    console.check(uids == {SIDECAR_ID}, "the sidecars do not run as root", f"uid {_listed(uids)}")
    ours = [world.pods[name].sidecar / "cgroup.procs" for name in ENROLLED]
    apart = all(len(path.read_text().split()) == 1 for path in ours)
    console.check(apart, "each sidecar is alone in its cgroup")
    console.quiet(f"$ redirector bootstrap {CLIENT} --ip {ADDRESSES[CLIENT]} --xds unix:xds.sock")
    asked = [_ads_config(world, name) for name in ENROLLED]
    console.check(
        all(config.get("api_type") == "DELTA_GRPC" for config in asked)
        and all(config.get("set_node_on_first_message_only") for config in asked),
        "each wants delta ADS, and says who it is only once",
    )
    reachable = [name for name in ENROLLED if world.accepts(name, ADDRESSES[name], ADMIN_PORT)]
    console.check(not reachable, "each admin interface is on loopback only", ", ".join(reachable))


def _ads_config(world: World, pod: str) -> dict[str, Any]:
    """How a sidecar itself says that it asks for its configuration."""
    dump = json.loads(world.admin(pod, "/config_dump") or "{}")
    for config in dump.get("configs", ()):
        if "bootstrap" in config:
            return dict(config["bootstrap"]["dynamic_resources"]["ads_config"])
    return {}


def _runs(pod: str) -> str:
    if pod == PLAIN:
        return "no sidecar, will not be enrolled"
    return "web server, Envoy" if pod in WEBS else "HTTP client, Envoy"


def serve(world: World, console: Console) -> None:
    """The xDS server on the demo's manifests; the sidecars become ready."""
    files = sorted(path.name for path in world.manifests_source.iterdir())
    console.say(f"{len(files)} manifests: Namespace, Pods, Services, EndpointSlices, an HTTPRoute,")
    console.say("AuthorizationPolicies. The directory is watched: a changed file is a push.")
    console.waiting("starting xds-server")
    started = time.monotonic()
    listening = world.start_xds_server()
    console.quiet(
        f"$ xds-server --manifests manifests/demo --listen {listening} --listen unix:xds.sock"
    )
    if listening.endswith(":0"):
        console.quiet("  (port 18000 is taken by another program: any free one)")
    console.check(True, "xds-server serves delta ADS", _since(started))
    console.waiting("waiting for the sidecars' configuration")
    for name in ENROLLED:
        world.wait(partial(world.admin, name, "/ready"), f"{name}'s sidecar")
    console.check(True, "every sidecar has its configuration", f"{_since(started)} from its start")
    stats = {name: _stats(world, name) for name in ENROLLED}
    console.table(
        ("sidecar", *_READY_STATS.values()),
        [(name, *(found[stat] for stat in _READY_STATS)) for name, found in stats.items()],
    )


def _stats(world: World, pod: str) -> dict[str, int]:
    stats = json.loads(world.admin(pod, "/stats?format=json") or '{"stats": []}')["stats"]
    return {stat["name"]: stat["value"] for stat in stats if "value" in stat}


def enroll(world: World, console: Console) -> None:
    """All pods but one, in eBPF mode."""
    console.say("The programs are compiled and loaded once for the node, then attached to each")
    console.say("pod's cgroup and network namespace. Nothing else on this machine is touched.")
    options = f"--mode {Mode.EBPF} --accelerate {Accelerate.ON}"
    console.quiet(f"$ redirector enroll {CLIENT} --netns NETNS --cgroup CGROUP {options}")
    for name in ENROLLED:
        console.waiting(f"enrolling {name}")
        pod = world.pods[name]
        started = time.monotonic()
        world.enrollment.enroll(name, pod.netns, pod.cgroup, Mode.EBPF, Accelerate.ON)
        loaded = ", with compiling and loading the programs" if name == ENROLLED[0] else ""
        console.check(True, f"{name} enrolled in eBPF mode", f"{_since(started)}{loaded}")
    console.quiet("  " + ", ".join(hook for hook, _ in ALL_HOOKS))
    found = world.enrollment.status()
    whole = [status.pod.name for status in found if not status.missing]
    console.check(
        sorted(whole) == sorted(ENROLLED),
        f"all {len(ALL_HOOKS)} programs hold in {', '.join(ENROLLED)}",
        _missing(found),
    )
    console.check(
        all(status.pod.name != PLAIN for status in found), f"{PLAIN} has none of them", "direct"
    )
    if defects := defect_names(found[0].defects):
        console.say(
            f"This kernel is wrong about redirected bytes ({', '.join(defects)}), so that by"
        )
        console.say("default pods would be steered without short-circuit on it. Nothing in")
        console.say("this demo needs what is wrong, so it insists (--accelerate on).")
    else:
        console.check(True, "tried out: this kernel tells and counts redirected bytes rightly")


def _missing(found: list[PodStatus]) -> str:
    return "; ".join(
        f"{status.pod.name} lacks {', '.join(status.missing)}" for status in found if status.missing
    )


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.2f} s"


def _listed(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))
