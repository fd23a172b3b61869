"""Metrics as Prometheus' own parser reads them back."""

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from redirector.datapath.layout import CONNECT_BUCKETS, ConnectKind, Counter, Defect
from redirector.metrics import render
from redirector.model import Accelerate, Mode, Pod
from redirector.status import Latency, MapFill, NodeStatus, Outcome, PodStatus, Tally, tallies
from redirector.steering import RULES, Verdict

POD = Pod(
    "shop/web", Path("/run/netns/web"), Path("/cgroup/web"), Mode.EBPF, Accelerate.ON,
    addresses=(ip_address("10.0.0.1"),),
)  # fmt: skip
COUNTERS = {counter: 100 + counter for counter in Counter}
BY_RULE = {rule.name: 1000 + index for index, rule in enumerate(RULES)}
EBPF = PodStatus(POD, (), COUNTERS, Defect(0), True, tallies(COUNTERS, BY_RULE), flows=12)
IPTABLES = PodStatus(
    replace(POD, name="plain", mode=Mode.IPTABLES),
    ("IPv4 chain X", "IPv6 chain X"),
    {},
    Defect(0),
    True,
    (Tally(Outcome.STEERED, "outbound", 3), Tally(Outcome.DIRECT, "outbound.proxy-uid", 4)),
)
NODE = NodeStatus((EBPF, IPTABLES), (MapFill("flows", 7, 131072),), Defect(0))


def parsed(status: NodeStatus, *others: Metric) -> dict[str, Metric]:
    text = b"".join(render(status, others)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    (found,) = (
        s.value
        for family in families.values()
        for s in family.samples
        if s.name == sample and s.labels.items() >= labels.items()
    )
    return found


def test_every_counter_of_connections_is_there_with_its_reason() -> None:
    families = parsed(NODE)
    pod = {"namespace": "shop", "pod": "web"}
    for tally in EBPF.tallies:
        reason = {**pod, "reason": tally.reason}
        if tally.outcome is Outcome.PASSED:
            assert value(families, "redirector_passed_total", **reason) == tally.count
        elif tally.outcome is Outcome.WITHHELD:
            option = {**pod, "option": tally.reason}
            assert value(families, "redirector_withheld_options_total", **option) == tally.count
        else:
            verdict = {**reason, "mode": "ebpf", "verdict": tally.outcome}
            assert value(families, "redirector_connections_total", **verdict) == tally.count
    steered = {**pod, "verdict": "steered", "reason": "outbound"}
    assert (
        value(families, "redirector_connections_total", **steered)
        == COUNTERS[Counter.STEERED_OUTBOUND]
    )
    moved = COUNTERS[Counter.REDIRECTED_BYTES]
    assert value(families, "redirector_redirected_bytes_total", **pod) == moved


def test_who_has_how_many_flows() -> None:
    families = parsed(replace(NODE, flows_floor=655))
    (of_ebpf,) = families["redirector_flows"].samples
    assert (of_ebpf.labels, of_ebpf.value) == ({"namespace": "shop", "pod": "web"}, 12)
    assert value(families, "redirector_flows_floor") == 655


def test_no_counter_is_left_out() -> None:
    direct = {
        tally.reason: tally.count for tally in EBPF.tallies if tally.outcome is Outcome.DIRECT
    }
    told = {
        f"{tally.outcome}_{tally.reason}".replace("-", "_")
        for tally in EBPF.tallies
        if tally.outcome is not Outcome.DIRECT
    }
    short_circuit = {"accelerated", "redirected_bytes", "redirected_messages"}
    assert {counter.name.lower() for counter in Counter} == told | short_circuit
    rules = {rule.name for rule in RULES if rule.verdict is Verdict.DIRECT}
    assert direct == {name: BY_RULE[name] for name in rules}


def test_a_pod_in_iptables_mode_has_connections_and_no_short_circuit() -> None:
    families = parsed(NODE)
    pod = {"namespace": "", "pod": "plain"}
    direct = {**pod, "mode": "iptables", "verdict": "direct", "reason": "outbound.proxy-uid"}
    assert value(families, "redirector_connections_total", **direct) == 4
    accelerated = families["redirector_accelerated_sockets"].samples
    assert [sample.labels["pod"] for sample in accelerated] == ["web"]
    assert value(families, "redirector_pod_missing_parts", **pod) == 2


def test_latencies_are_a_histogram() -> None:
    # 3 within 16 µs, 2 more within 64 µs, one that took longer than all buckets.
    buckets = [0] * CONNECT_BUCKETS
    buckets[3], buckets[4], buckets[6], buckets[-1] = 1, 2, 2, 1
    latency = Latency(tuple(buckets), 31.5)
    families = parsed(NodeStatus((replace(EBPF, latencies={ConnectKind.STEERED: latency}),)))
    pod = {"namespace": "shop", "pod": "web", "verdict": "steered"}
    bucket = "redirector_connect_seconds_bucket"
    assert value(families, bucket, **pod, le="1.6e-05") == 3
    assert value(families, bucket, **pod, le="6.4e-05") == 5
    assert value(families, bucket, **pod, le="16.777216") == 5
    assert value(families, bucket, **pod, le="+Inf") == 6
    assert value(families, "redirector_connect_seconds_count", **pod) == 6
    assert value(families, "redirector_connect_seconds_sum", **pod) == 31.5
    assert (latency.quantile(0.5), latency.quantile(0.99)) == (16e-6, float("inf"))


def test_followers_and_lost_events_are_told() -> None:
    families = parsed(NodeStatus((), followers=2, events_lost=7))
    assert value(families, "redirector_flow_followers") == 2
    assert value(families, "redirector_flow_events_lost_total") == 7


def test_the_node_tells_pods_by_mode_and_how_full_its_maps_are() -> None:
    families = parsed(NODE)
    assert value(families, "redirector_pods", mode="ebpf", accelerated="true") == 1
    assert value(families, "redirector_pods", mode="ebpf", accelerated="false") == 0
    assert value(families, "redirector_pods", mode="iptables") == 1
    assert value(families, "redirector_map_entries", map="flows") == 7
    assert value(families, "redirector_map_max_entries", map="flows") == 131072
    assert value(families, "redirector_build_info") == 1


def test_auto_is_not_accelerated_on_a_kernel_that_is_wrong() -> None:
    auto = replace(EBPF, pod=replace(POD, accelerate=Accelerate.AUTO), defects=Defect.FIONREAD)
    families = parsed(NodeStatus((auto,), (), Defect.FIONREAD))
    assert value(families, "redirector_pods", mode="ebpf", accelerated="false") == 1
    assert value(families, "redirector_kernel_defect", defect="fionread") == 1


def test_every_family_says_what_it_is() -> None:
    families = parsed(NODE, GaugeMetricFamily("redirector_agent_x", "of another room", 5))
    assert value(families, "redirector_agent_x") == 5
    assert all(family.documentation for family in families.values())
    assert all(name.startswith("redirector_") for name in families)


def test_many_pods_are_told_in_small_pieces() -> None:
    """What is held at a time, half a kilobyte for each sample, does not grow with the pods."""

    def longest(pods: int) -> int:
        many = [replace(EBPF, pod=replace(POD, name=f"shop/web-{n:04}")) for n in range(pods)]
        return max(map(len, render(replace(NODE, pods=tuple(many)))))

    assert longest(400) == longest(200)
