"""`redirector run`: the agent as a command."""

import argparse
import logging
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from redirector import machine
from redirector.agent.log import Format, say, set_up
from redirector.agent.loop import Agent, Settings
from redirector.agent.telling import Telling
from redirector.apiserver.client import Client, elsewhere, in_cluster
from redirector.enrollment import Enrollment
from redirector.errors import InputError
from redirector.kubernetes.cluster import Cluster
from redirector.kubernetes.desired import NONE
from redirector.kubernetes.places import Places
from redirector.model import Accelerate, Mode
from redirector.serving import Server

NODE_VARIABLE = "NODE_NAME"
#: Beside Istio's 15000-15090, of which it uses none.
METRICS = "127.0.0.1:15018"
_OUTSIDE = "name the server with --api-server, or use --no-kubernetes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `redirector run`."""
    parser.add_argument(
        "--node", metavar="NAME", help=f"this node's name in Kubernetes (default: ${NODE_VARIABLE})"
    )
    parser.add_argument(
        "--default-mode",
        choices=[*map(str, Mode), NONE],
        default=NONE,
        help="for pods that neither their own annotations nor their namespace's say anything of "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--default-accelerate",
        choices=[*map(str, Accelerate)],
        default=str(Accelerate.AUTO),
        help="for pods whose annotations do not say it (default: %(default)s)",
    )
    parser.add_argument(
        "--no-kubernetes",
        action="store_true",
        help="ask no API server: keep whole what was enrolled by hand, and serve metrics",
    )
    parser.add_argument(
        "--api-server", metavar="URL", help="another API server than that of the pod's own cluster"
    )
    parser.add_argument(
        "--metrics",
        metavar="ADDRESS",
        default=METRICS,
        help="serve /metrics, /healthz and /readyz here (default: %(default)s)",
    )
    parser.add_argument(
        "--cgroup-root",
        metavar="DIR",
        type=Path,
        help="where the kubelet's cgroups begin (default: the cgroup2 mount)",
    )
    parser.add_argument(
        "--resync",
        metavar="SECONDS",
        type=_seconds,
        default=30.0,
        help="how often what is enrolled is compared with the kernel (default: %(default)g)",
    )
    parser.add_argument(
        "--log", choices=[*map(str, Format)], default=Format.TEXT, help="default: %(default)s"
    )


def tell(text: str) -> None:
    """Log what fails nothing, and that somebody should know."""
    say(logging.WARNING, text)


def run(
    arguments: argparse.Namespace, enrollment: Enrollment, environment: Mapping[str, str]
) -> int:
    """Run until SIGTERM or SIGINT; what is steered stays so."""
    set_up(Format(arguments.log))
    default = None if arguments.default_mode == NONE else Mode(arguments.default_mode)
    accelerate = Accelerate(arguments.default_accelerate)
    settings = Settings(default, accelerate, arguments.resync)
    places = Places(arguments.cgroup_root or machine.cgroup2_mount())
    changed = threading.Event()
    cluster = None if arguments.no_kubernetes else _cluster(arguments, environment, changed.set)
    agent = Agent(enrollment, places, cluster, settings, changed)
    telling = Telling(agent, enrollment, cluster.problems if cluster else list, settings.resync)
    server = Server(arguments.metrics, telling.pages())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: agent.stop())
    server.start()
    if cluster is not None:
        cluster.start()
    say(logging.INFO, "started", metrics_port=server.port, default_mode=arguments.default_mode)
    agent.run()
    say(logging.INFO, "stopped; pods stay as they are")
    return 0


def _cluster(
    arguments: argparse.Namespace, environment: Mapping[str, str], changed: Callable[[], None]
) -> Cluster:
    node = arguments.node or environment.get(NODE_VARIABLE)
    if not node:
        raise InputError(
            f"--node is missing: whose pods are meant? give --node NAME or set {NODE_VARIABLE}, "
            "or use --no-kubernetes"
        )
    url = arguments.api_server
    if url is not None and not url.startswith(("http://", "https://")):
        raise InputError(f"--api-server {url}: is not a URL such as https://10.0.0.1:6443")
    access = in_cluster(environment, _OUTSIDE) if url is None else elsewhere(url)
    return Cluster(
        Client(access), node, changed, lambda text: say(logging.WARNING, "API server", error=text)
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return value
