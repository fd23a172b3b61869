"""What annotations ask for, and what is wrong with them."""

import re
from dataclasses import replace

import pytest
from apiserver import pod as pod_json

from redirector.kubernetes.desired import Refusal, Rest, Verdict, Wish, desired
from redirector.kubernetes.objects import NamespaceObject, PodObject, read_pod
from redirector.model import Accelerate, Mode, Steering


def judge(
    pod: PodObject, default: Mode | None = None, namespace: dict[str, str] | None = None
) -> Verdict:
    namespaces = {"shop": NamespaceObject("shop", namespace or {})}
    (verdict,) = desired([pod], namespaces, default).values()
    return verdict


def pod(**annotations: str) -> PodObject:
    return PodObject("shop", "web", "uid-1", annotations=annotations)


def test_the_pod_comes_before_its_namespace_and_that_before_the_agent() -> None:
    everybody = {"mode": "iptables"}
    assert judge(pod(), None) is Rest.NOT_ASKED
    assert judge(pod(), Mode.EBPF) == Wish(pod(), Mode.EBPF, Accelerate.AUTO, Steering())
    for verdict, mode in (
        (judge(pod(), Mode.EBPF, everybody), Mode.IPTABLES),
        (judge(pod(mode="ebpf"), None, everybody), Mode.EBPF),
    ):
        assert isinstance(verdict, Wish)
        assert verdict.mode is mode
    assert judge(pod(), Mode.EBPF, {"mode": "none"}) is Rest.NOT_ASKED
    assert judge(pod(mode="none"), Mode.EBPF, everybody) is Rest.NOT_ASKED


def test_options_are_annotations() -> None:
    asked = pod(mode="ebpf", accelerate="off", excludeOutboundPorts="25,587", proxyUID="1000")
    verdict = judge(asked)
    steering = Steering(exclude_outbound_ports=frozenset({25, 587}), proxy_uids=(1000,))
    assert verdict == Wish(asked, Mode.EBPF, Accelerate.OFF, steering)


@pytest.mark.parametrize(
    ("annotations", "told"),
    [
        ({"excludeOutboundPorts": "70000"}, r"redirector.io/excludeOutboundPorts: '70000'"),
        (
            {"includeOutboundIPRanges": "10.0.0.0/33"},
            r"redirector.io/includeOutboundIPRanges: '10.0.0.0/33'",
        ),
        ({"mode": "epbf"}, r"redirector.io/mode: 'epbf' .* did you mean ebpf\?"),
        ({"mode": ""}, r"redirector.io/mode: '' .* use one of ebpf, iptables, none"),
        ({"accelerate": "yes"}, r"redirector.io/accelerate: 'yes' .* use one of auto, on, off"),
        ({"acelerate": "on"}, r"redirector.io/acelerate: 'on'.* mean redirector.io/accelerate\?"),
        (
            {"excludeOutboundPort": "80"},
            r"redirector.io/excludeOutboundPort: '80'.*mean redirector.io/excludeOutboundPorts\?",
        ),
        ({"zzz": "1"}, r"redirector.io/zzz: '1': no such annotation; there are mode, "),
    ],
)
def test_a_mistyped_annotation_refuses_its_pod(annotations: dict[str, str], told: str) -> None:
    asked = replace(pod(mode="ebpf"), annotations={"mode": "ebpf", **annotations})
    other = PodObject("shop", "other", "uid-2", annotations={"mode": "ebpf"})
    verdicts = desired([asked, other], {}, None)
    refusal = verdicts["shop/web"]
    assert isinstance(refusal, Refusal)
    assert refusal.text.startswith("pod shop/web: redirector.io/")

    assert re.search(told, refusal.text), refusal.text
    assert "\n" not in refusal.text
    assert isinstance(verdicts["shop/other"], Wish)


def test_a_namespaces_mistake_refuses_only_those_who_inherit_it() -> None:
    wrong = {"mode": "on"}
    refusal = judge(pod(), None, wrong)
    assert isinstance(refusal, Refusal)
    assert refusal.text.startswith("pod shop/web: redirector.io/mode of namespace shop: 'on' ")
    assert isinstance(judge(pod(mode="ebpf"), None, wrong), Wish)


def test_none_holds_whatever_is_written_beside_it() -> None:
    assert judge(pod(mode="none", outboundPort="x", nonsense="y")) is Rest.NOT_ASKED


def test_a_pod_of_an_unknown_namespace_waits() -> None:
    assert desired([pod()], {}, Mode.EBPF) == {"shop/web": None}
    assert desired([pod(mode="ebpf")], {}, None)["shop/web"] is not None


def test_the_nodes_own_network_is_never_steered() -> None:
    own = replace(pod(), host_network=True)
    assert judge(own, Mode.EBPF) is Rest.NOT_ASKED
    for verdict in (
        judge(replace(own, annotations={"mode": "ebpf"})),
        judge(own, None, {"mode": "iptables"}),
    ):
        assert isinstance(verdict, Refusal)
        assert "hostNetwork" in verdict.text
    assert judge(replace(own, annotations={"mode": "none"}), None, {"mode": "ebpf"}) is (
        Rest.NOT_ASKED
    )


def test_the_default_is_not_for_the_cluster_itself() -> None:
    """A cluster whose DNS waits for a sidecar that it does not have is no cluster."""
    system = replace(pod(), namespace="kube-system")
    namespaces = {"kube-system": NamespaceObject("kube-system", {})}
    assert desired([system], namespaces, Mode.EBPF) == {"kube-system/web": Rest.NOT_ASKED}
    asked = replace(system, annotations={"mode": "ebpf"})
    assert isinstance(desired([asked], namespaces, None)["kube-system/web"], Wish)


def test_a_finished_pod_is_released() -> None:
    for phase in ("Succeeded", "Failed"):
        value = pod_json("web", "uid-1", annotations={"mode": "ebpf"})
        value["status"]["phase"] = phase
        assert desired([read_pod(value)], {}, None) == {"default/web": Rest.FINISHED}


def test_what_is_kept_of_a_pod() -> None:
    value = pod_json("web", "uid-1", annotations={"mode": "ebpf"}, hostNetwork=True)
    value["metadata"]["annotations"]["kubernetes.io/config.mirror"] = "abc"
    value["status"] = {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}
    found = read_pod(value)
    assert (found.full_name, found.uid, found.kubelet_uid) == ("default/web", "uid-1", "abc")
    assert found.annotations == {"mode": "ebpf"}
    assert found.host_network
    assert list(map(str, found.addresses)) == ["10.0.0.1", "fd00::1"]


@pytest.mark.parametrize(
    "change",
    [{"metadata": []}, {"metadata": {"name": "x"}}, {"status": 1}, {"status": {"podIPs": "x"}}],
)
def test_what_is_no_pod(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"metadata|status|podIPs"):
        read_pod({**pod_json("web", "uid-1"), **change})
