"""The cluster as the agent of one node sees it: its pods, all namespaces; and a voice."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from redirector.apiserver.client import Client
from redirector.apiserver.reflector import Reflector, Resource
from redirector.errors import ClusterError
from redirector.kubernetes.objects import (
    NamespaceObject,
    PodObject,
    read_namespace,
    read_pod,
)

COMPONENT = "redirector"
#: Events that wait for a slow server; more are dropped, the log has them all.
_WAITING = 1000


@dataclass(frozen=True)
class View:
    """What the API server told last, whole."""

    pods: tuple[PodObject, ...]
    namespaces: Mapping[str, NamespaceObject]


class Cluster:
    """Two watches and a sender of Events, each in a thread of its own."""

    def __init__(
        self,
        client: Client,
        node: str,
        changed: Callable[[], None],
        complain: Callable[[str], None],
    ) -> None:
        self._client = client
        self._node = node
        self._complain = complain
        pods = Resource("/api/v1/pods", read_pod, {"fieldSelector": f"spec.nodeName={node}"})
        namespaces = Resource("/api/v1/namespaces", read_namespace, {}, metadata_only=True)
        self._pods = Reflector(client, pods, changed, complain)
        self._namespaces = Reflector(client, namespaces, changed, complain)
        self._events: queue.Queue[tuple[str, dict[str, object]]] = queue.Queue(_WAITING)

    def start(self) -> None:
        """Begin to watch and to tell; the threads end with the process."""
        self._pods.start()
        self._namespaces.start()
        threading.Thread(target=self._tell, name="events", daemon=True).start()

    def view(self) -> View | None:
        """What is known; None before both lists were complete."""
        pods, namespaces = self._pods.objects(), self._namespaces.objects()
        if pods is None or namespaces is None:
            return None
        # Servers honour the selector; what another node runs is never ours.
        own = tuple(pod for pod in pods.values() if pod.node == self._node)
        return View(own, namespaces)

    def problems(self) -> list[str]:
        """Why the view may be old; [] while the server answers."""
        found = (self._pods.problem, self._namespaces.problem)
        return [problem for problem in found if problem]

    def warn(self, pod: PodObject, reason: str, text: str) -> None:
        """Put an Event on a pod, when the server takes it; never waits."""
        body = _event(pod, reason, text, self._node, time.time())
        try:
            self._events.put_nowait((f"/api/v1/namespaces/{pod.namespace}/events", body))
        except queue.Full:
            self._complain(f"pod {pod.full_name}: an Event is dropped, {_WAITING} are waiting")

    def _tell(self) -> None:
        while True:
            path, body = self._events.get()
            try:
                self._client.create(path, body)
            except ClusterError as error:
                self._complain(f"an Event is not taken: {error}")


def _event(pod: PodObject, reason: str, text: str, node: str, now: float) -> dict[str, object]:
    """A v1 Event (kubectl describe pod)."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    return {
        "apiVersion": "v1",
        "kind": "Event",
        # As client-go names them: unique without asking.
        "metadata": {"name": f"{pod.name[:230]}.{int(now * 1e9):x}", "namespace": pod.namespace},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid,
        },
        "type": "Warning",
        "reason": reason,
        # The API server takes 1024 characters.
        "message": text[:1024],
        "source": {"component": COMPONENT, "host": node},
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
        "reportingComponent": COMPONENT,
        "reportingInstance": node,
    }
