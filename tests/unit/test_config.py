"""What `enroll --config FILE` reads, and how it says what is wrong."""

from pathlib import Path

import pytest

from redirector.config import PLACE, read
from redirector.errors import InputError
from redirector.options import OPTIONS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pod.yaml"


def test_lists_and_words_are_as_on_the_command_line(file: Path) -> None:
    file.write_text("""
name: demo/web
netns: /run/netns/web
mode: ebpf
includeOutboundIPRanges: [10.0.0.0/8, "fd00::/8"]
excludeOutboundPorts: 22,25
includeInboundPorts: "*"
proxyUID: 1337
includeOwnerGroups:
  - 5
  - 6
dnsCapture: true
""")
    assert read(file) == {
        "name": "demo/web",
        "netns": "/run/netns/web",
        "mode": "ebpf",
        "includeOutboundIPRanges": "10.0.0.0/8,fd00::/8",
        "excludeOutboundPorts": "22,25",
        "includeInboundPorts": "*",
        "proxyUID": "1337",
        "includeOwnerGroups": "5,6",
        "dnsCapture": "true",
    }


def test_numbers_are_what_is_written(file: Path) -> None:
    file.write_text("dnsPort: 22:30\nproxyUID: [010, 0x10, 1_0]\ndnsCapture: yes\nname: 1.0\n")
    assert read(file) == {
        "dnsPort": "22:30",
        "proxyUID": "010,0x10,1_0",
        "dnsCapture": "yes",
        "name": "1.0",
    }


def test_json_is_read_too(file: Path) -> None:
    file.write_text('{"cgroup": "/x", "excludeInterfaces": ["eth1"], "dnsCapture": false}')
    assert read(file) == {"cgroup": "/x", "excludeInterfaces": "eth1", "dnsCapture": "false"}


def test_every_option_may_be_there(file: Path) -> None:
    names = [*PLACE, *(option.name for option in OPTIONS)]
    file.write_text("".join(f"{name}: x\n" for name in names))
    assert list(read(file)) == names


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no keys"),
        ("- a\n", "holds no keys"),
        ("a: [", "is neither YAML nor JSON: while parsing"),
        ("includeInboundPorts: *", "is neither YAML nor JSON"),
        ("proxyUID: 1\nproxyUID: 2\n", "key proxyUID is there twice"),
        ("proxyUid: 1\n", "proxyUid: no such key; did you mean proxyUID?"),
        ("1: 2\n", "1: no such key; there are name, netns, "),
        ("mode:\n", "mode: has no value; give a word, a number, or a list of them"),
        ("excludeOutboundPorts: {a: 1}\n", "excludeOutboundPorts: {'a': '1'} is not a value"),
        ("excludeOutboundPorts: [[80], null]\n", "excludeOutboundPorts: has no value"),
        ("\0", "is neither YAML nor JSON"),
        ("includeOutboundPorts: &x [80, *x]\n", "aliases are not read"),
        ("? [a, b]\n: 1\n", "a key must be a word"),
        ("? {a: b}\n: 1\n", "a key must be a word"),
        ("includeOutboundPorts: " + "[" * 5000, "lists too deep in lists"),
        ("includeOutboundPorts: !!python/object:os.system x\n", "is neither YAML nor JSON"),
    ],
)
def test_what_is_wrong_names_file_key_and_value(file: Path, text: str, told: str) -> None:
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=rf"{path}: .*; give a file in YAML or JSON"):
            read(path)
