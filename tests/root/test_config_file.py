"""`enroll --config FILE` and `explain`, as a user calls them."""

import json
import subprocess
from pathlib import Path

import pytest
import traces

from redirector.cli import main
from redirector.datapath.pins import Datapath
from redirector.enrollment import Enrollment
from redirector.lab import Node

pytestmark = pytest.mark.root


def test_flags_win_and_mistakes_change_nothing(
    node: Node,
    datapath: Datapath,
    enrollment: Enrollment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REDIRECTOR_PINS", str(datapath.root))
    monkeypatch.setenv("REDIRECTOR_STATE", str(tmp_path / "pods"))
    lab, file = node.pod("pod"), tmp_path / "pod.yaml"

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    def write(**changed: object) -> None:
        chosen = {
            "name": "demo/pod",
            "netns": str(lab.netns),
            "cgroup": str(lab.cgroup),
            "mode": "ebpf",
            "excludeOutboundIPRanges": ["10.1.0.0/16", "fd01::/16"],
            "excludeOwnerGroups": [7],
            "dnsCapture": True,
            "dnsServers": "10.96.0.10",
        }
        file.write_text(json.dumps(chosen | changed))

    for changed, words, told in (
        ({"mode": "tproxy"}, (), f"{file}: mode: 'tproxy' is none of ebpf, iptables"),
        ({"excludeOutboundIPRanges": ["10.0.0.0/33"]}, (),
         f"{file}: excludeOutboundIPRanges: '10.0.0.0/33' is not an IP range"),
        ({"outboundPort": 15006}, (), "outboundPort and"),
        ({"proxyUID": "root"}, (), f"{file}: proxyUID: 'root' is not a user or group id"),
        ({"proxyUID": "root"}, ("--proxy-uid", "me"), "--proxy-uid: 'me' is not a user"),
        ({"proxyuid": 1}, (), f"{file}: proxyuid: no such key; did you mean proxyUID?"),
        ({"kubevirtInterfaces": ["eth9"]}, (), "kubevirtInterfaces"),
    ):  # fmt: skip
        write(**changed)
        code, out, err = run("enroll", "--config", str(file), *words)
        assert (code, out) == (2, "")
        assert told in err
        assert err.count("\n") == 1
        assert traces.in_pod(lab) == []

    write()
    code, out, _ = run("enroll", "--config", str(file), "--exclude-owner-groups", "8", "demo/other")
    assert (code, out) == (0, "pod demo/other enrolled in ebpf mode\n")
    late = ["ip", "-n", lab.netns.name, "address", "add", "10.99.0.9/32", "dev", "lo"]
    subprocess.run(late, check=True)
    for mode in ("ebpf", "iptables"):
        run("mode", "demo/other", mode)
        for words, told in (
            (("--to", "10.1.2.3:80"), "direct, by rule outbound.excluded-cidr"),
            (("--to", "10.96.0.1:80", "--gid", "7"), "outbound.included-cidr"),
            (("--to", "10.96.0.1:80", "--gid", "8"), "direct, by rule outbound.excluded-group"),
            (("--to", "10.96.0.10:53", "--udp"), "DNS port 15053, by rule outbound.dns"),
            (
                ("--to", f"{lab.ip}:80", "--inbound"),
                "inbound port 15006, by rule inbound.included-",
            ),
            (("--to", "10.99.0.9:80", "--inbound"), "inbound port 15006"),
        ):
            code, out, _ = run("explain", "demo/other", *words)
            assert code == 0
            assert told in out
            assert out.endswith(f"({mode} mode)\n")
    assert [pod.name for pod in enrollment.pods()] == ["demo/other"]
    code, out, err = run("explain", "demo/other", "--to", "10.1.2.3:80", "--interface", "nope")
    assert (code, out) == (2, "")
    assert err == "redirector: --interface nope: pod demo/other has none; it has eth0, lo\n"

    code, out, err = run("enroll", "--netns", str(lab.netns))
    assert (code, out) == (2, "")
    assert "name, cgroup, mode must be given" in err
