"""Manifests in, Envoy resources (or problems) out: tests/golden/xds/NAME.in.yaml -> NAME.out.yaml.

The input's first line names the sidecar that the resources are for.
"""

import json
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from envoy_static import as_json, refused_by_envoy
from google.protobuf import symbol_database
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from xds_server.conditions import ObjectStatus
from xds_server.errors import Problem
from xds_server.ingest import ingest
from xds_server.ir import Mesh, NodeId
from xds_server.sources.files import parse
from xds_server.translate import Resources, translate

GOLDEN = Path(__file__).parents[2] / "golden" / "xds"
NAMES = sorted(path.name.removesuffix(".in.yaml") for path in GOLDEN.glob("*.in.yaml"))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, _data: Any) -> bool:
        return True


@cache
def outcome(name: str) -> tuple[Mesh, Resources, list[Problem]]:
    file = GOLDEN / f"{name}.in.yaml"
    text = file.read_text()
    node = text.splitlines()[0].removeprefix("# node: ")
    objects, unreadable = parse(file.name, text)
    mesh, wrong = ingest(objects)
    return mesh, translate(mesh, NodeId.parse(node)), unreadable + wrong


def rendered(name: str) -> str:
    mesh, resources, problems = outcome(name)
    found = {
        "problems": [str(problem) for problem in problems],
        "left out": list(mesh.left_out),
        "closed": list(mesh.closed),
    }
    if mesh.statuses:
        found["statuses"] = [line for status in mesh.statuses for line in status_lines(status)]
    tree: dict[str, object] = {key: value for key, value in found.items() if value}
    tree |= {
        url.rsplit(".", 1)[1]: {key: json.loads(as_json(message)) for key, message in named.items()}
        for url, named in resources.items()
    }
    return yaml.dump(tree, Dumper=_Dumper, width=1000)


def status_lines(status: ObjectStatus) -> Iterator[str]:
    """One for each parent and condition."""
    for parent in status.parents:
        of = ".".join(filter(None, (parent.parent.name, parent.parent.namespace)))
        port = parent.parent.section_name or parent.parent.port
        for one in parent.conditions:
            yield (
                f"{status.subject} at {of}{f':{port}' if port else ''}: {one.type} {one.status}, "
                f"{one.reason}{f': {one.message}' if one.message else ''}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, update_golden: bool) -> None:
    expected = GOLDEN / f"{name}.out.yaml"
    if update_golden:
        expected.write_text(rendered(name))
    assert rendered(name) == expected.read_text(), "run pytest --update-golden and read the diff"


def test_no_orphans(update_golden: bool) -> None:
    for orphan in GOLDEN.glob("*.out.yaml"):
        if orphan.name.removesuffix(".out.yaml") not in NAMES:
            assert update_golden, f"{orphan} has no input; run pytest --update-golden to remove it"
            orphan.unlink()
    assert NAMES


def payloads(message: Message) -> list[tuple[str, bytes]]:
    """Every message packed into this one, at any depth, by type name."""
    found = []
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            values = list(value.values())
        else:
            values = list(value) if field.is_repeated else [value]
        for item in values:
            if isinstance(item, AnyMessage):
                name = item.TypeName()
                found.append((name, item.value))
                inner = symbol_database.Default().GetSymbol(name)()
                inner.ParseFromString(item.value)
                found += payloads(inner)
            elif isinstance(item, Message):
                found += payloads(item)
    return found


def second_decoder(full_name: str) -> Any:
    package, _, kind = full_name.rpartition(".")
    module = import_module(f"envoy_data_plane.{package}")
    (found,) = (name for name in dir(module) if name.lower() == kind.lower())
    return getattr(module, found)


@pytest.mark.parametrize("name", NAMES)
def test_an_independent_decoder_reads_the_same(name: str) -> None:
    """betterproto2 decodes every resource and everything packed inside; encoded again by it, the
    message is equal."""
    checked = 0
    for named in outcome(name)[1].values():
        for message in named.values():
            whole = (message.DESCRIPTOR.full_name, message.SerializeToString())
            for full_name, data in [whole, *payloads(message)]:
                other = second_decoder(full_name)
                first, second = (symbol_database.Default().GetSymbol(full_name)() for _ in "12")
                first.ParseFromString(data)
                decoded = other.parse(data)
                second.ParseFromString(bytes(decoded))
                assert not decoded._unknown_fields
                assert first == second, full_name
                checked += 1
    assert checked > 5


@pytest.mark.parametrize("name", NAMES)
def test_envoy_accepts_it(name: str, tmp_path: Path) -> None:
    assert refused_by_envoy(outcome(name)[1], tmp_path) == ""
