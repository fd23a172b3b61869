"""A node's pods in the forms that `redirector status` prints. Pure."""

from collections.abc import Iterator

from redirector import records
from redirector.model import Accelerate, Mode
from redirector.status import SHORT_CIRCUIT, NodeStatus, PodStatus, defect_names


def to_json(node: NodeStatus) -> list[dict[str, object]]:
    """As JSON values: each pod's record and what is known of it, then the pods that are refused."""
    pods = [_pod_json(status, node.problems.get(status.pod.name)) for status in node.pods]
    return pods + [
        {"name": name, "mode": None, "missing": [], "problem": text}
        for name, text in _not_enrolled(node)
    ]


def to_text(node: NodeStatus) -> str:
    """As lines, what is zero left out."""
    texts = [_pod_text(status, node.problems.get(status.pod.name)) for status in node.pods]
    texts += [f"{name}  not enrolled\n{_problem(text)}" for name, text in _not_enrolled(node)]
    return "".join(texts) or "no pod enrolled\n"


def _not_enrolled(node: NodeStatus) -> list[tuple[str, str]]:
    enrolled = {status.pod.name for status in node.pods}
    return [(name, text) for name, text in node.problems.items() if name not in enrolled]


def _problem(text: str) -> str:
    return f"  NOT AS ASKED: {text}\n"


def _pod_json(status: PodStatus, problem: str | None) -> dict[str, object]:
    return records.to_json(status.pod) | {
        "problem": problem,
        "missing": list(status.missing),
        "kernel_defects": defect_names(status.defects),
        "flows": status.flows,
        "counters": {counter.name.lower(): n for counter, n in status.counters.items()},
        "connections": [
            {"verdict": tally.outcome.value, "reason": tally.reason, "count": tally.count}
            for tally in status.tallies
        ],
        "connect_seconds": {
            kind.name.lower(): {
                "count": latency.count,
                "sum": latency.seconds,
                "buckets": [{"le": bound, "count": n} for bound, n in latency.cumulative()],
            }
            for kind, latency in status.latencies.items()
        },
    }


def _pod_text(status: PodStatus, problem: str | None) -> str:
    pod = status.pod
    addresses = " ".join(map(str, pod.node_wide or pod.addresses))
    lines = [f"{pod.name}  {pod.mode}  {addresses}"]
    if pod.mode is Mode.EBPF:
        lines[0] += f"  accelerate {pod.accelerate}"
        if status.defects and pod.accelerate is Accelerate.AUTO:
            names = ", ".join(defect_names(status.defects))
            lines[0] += f" (off: this kernel is wrong about {names} of redirected bytes)"
    if status.missing:
        lines.append(
            f"  INCOMPLETE: lacks {', '.join(status.missing)}; repair: redirector mode "
            f"{pod.name} {pod.mode}"
            if status.repairable
            else f"  LOST: {', '.join(status.missing)}; take it off: redirector unenroll {pod.name}"
        )
    lines += [f"  {name:40}{n:>14}" for name, n in _shown(status) if n]
    lines += [
        f"  connect() {kind.name.lower()}: half within {_time(latency.quantile(0.5))}, 99 % within "
        f"{_time(latency.quantile(0.99))}"
        for kind, latency in status.latencies.items()
        if latency.count
    ]
    return "\n".join(lines) + "\n" + (_problem(problem) if problem else "")


def _shown(status: PodStatus) -> Iterator[tuple[str, int]]:
    for tally in status.tallies:
        yield f"{tally.outcome} {tally.reason}", tally.count
    yield "flows", status.flows or 0
    for counter in SHORT_CIRCUIT:
        yield counter.name.lower().replace("_", " "), status.counters.get(counter, 0)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
