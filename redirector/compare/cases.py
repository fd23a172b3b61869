"""What is compared: the cases and the rungs, as data. Pure."""

from dataclasses import dataclass
from enum import StrEnum

KIB = 1024


class Rung(StrEnum):
    """A way from the application to what it talks to, from the barest to the product's."""

    DIRECT = "direct"
    UNIX = "unix"
    LOOPBACK = "loopback"
    IPTABLES = "iptables"
    EBPF = "ebpf"
    SOCKMAP = "ebpf+sockmap"


RUNG_TEXT: dict[Rung, str] = {
    Rung.DIRECT: "to a server in another pod: no redirection, no sidecar",
    Rung.UNIX: "to the sidecar by a Unix socket in the same pod, configured by hand",
    Rung.LOOPBACK: "to the sidecar by 127.0.0.1, configured by hand",
    Rung.IPTABLES: "to a service address, steered to the sidecar by iptables",
    Rung.EBPF: "to a service address, steered to the sidecar by eBPF",
    Rung.SOCKMAP: "steered by eBPF, bytes moved from socket to socket",
}

#: The rungs that steer, and those every other rung is compared with.
STEERED = (Rung.IPTABLES, Rung.EBPF, Rung.SOCKMAP)
BASELINES = (Rung.IPTABLES, Rung.UNIX, Rung.EBPF)


class Metric(StrEnum):
    """The metrics that ratios are made of; names are those of the JSON."""

    P50 = "p50_us"
    P99 = "p99_us"
    OPS = "ops_per_s"
    CPU = "cpu_us_per_op"

    @property
    def more_is_better(self) -> bool:
        """Whether a ratio above 1 is a win."""
        return self is Metric.OPS


class Load(StrEnum):
    """The role of `load.lua` that drives a case."""

    ECHO = "echo"
    HTTP = "http"
    CONNECT = "connect"
    BULK = "bulk"


@dataclass(frozen=True)
class Case:
    """One thing measured on every rung.

    `number`: bytes of a message or write (echo, bulk), connections (http, connect).
    `sidecars`: proxies on the way on the steered rungs; 0 is the sidecar's port alone.
    """

    name: str
    load: Load
    number: int
    sidecars: int
    text: str

    @property
    def has_latency(self) -> bool:
        """Whether an operation has a latency of its own; a write into a stream has none."""
        return self.load is not Load.BULK

    @property
    def main(self) -> Metric:
        """The metric to look at first."""
        return Metric.P50 if self.has_latency else Metric.OPS

    def gbit(self, ops_per_s: float) -> float:
        """Return the throughput of a stream in Gbit/s, from its writes a second."""
        return ops_per_s * self.number * 8 / 1e9


CASES: tuple[Case, ...] = (
    Case("echo-64B", Load.ECHO, 64, 0, "64 B there and back, app to sidecar port"),
    Case("echo-4KiB", Load.ECHO, 4 * KIB, 0, "4 KiB there and back, app to sidecar port"),
    Case("echo-64KiB", Load.ECHO, 64 * KIB, 0, "64 KiB there and back, app to sidecar port"),
    Case("http-1-sidecar-c1", Load.HTTP, 1, 1, "keep-alive, answered by Envoy, 1 connection"),
    Case("http-1-sidecar-c16", Load.HTTP, 16, 1, "keep-alive, answered by Envoy, 16 connections"),
    Case("http-2-sidecars-c1", Load.HTTP, 1, 2, "app, two Envoys, app, 1 connection"),
    Case("http-2-sidecars-c16", Load.HTTP, 16, 2, "app, two Envoys, app, 16 connections"),
    Case("connect-rate", Load.CONNECT, 1, 1, "a new connection to Envoy for each request"),
    Case("bulk-128KiB", Load.BULK, 128 * KIB, 1, "through Envoy's tcp_proxy, 128 KiB writes"),
    Case("bulk-1KiB", Load.BULK, KIB, 1, "through Envoy's tcp_proxy, 1 KiB writes"),
)


def why_not(case: Case, rung: Rung) -> str | None:
    """Say why a rung cannot carry a case, or None when it can."""
    if rung is Rung.UNIX and case.sidecars == 2:
        return "no Unix socket leads to another pod's sidecar"
    return None
