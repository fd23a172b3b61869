"""Reading manifests from a directory."""

import json
import os
from pathlib import Path

import pytest
from xds_server.sources.files import Manifests, load, parse

from redirector.errors import InputError

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\n"
ROOT = Path(__file__).parents[3]


def names(directory: Path) -> list[str]:
    objects, problems = load(directory)
    assert problems == []
    return [str(entry.data["metadata"]["name"]) for entry in objects]  # type: ignore[index]


def test_order_is_by_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(POD % "c")
    (tmp_path / "a.yml").write_text("---\n" + POD % "a" + "---\n---\n" + POD % "b" + "---\n")
    (tmp_path / "c.json").write_text('{"apiVersion": "v1", "metadata": {"name": "d"}}')
    assert names(tmp_path) == ["a", "b", "c", "d"]


def test_what_is_not_a_manifest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("{")
    (tmp_path / ".#a.yaml").write_text("{")
    (tmp_path / "a.yaml~").write_text("{")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert names(tmp_path) == []


def test_a_list_stands_for_its_items() -> None:
    objects, problems = parse("f", "kind: List\nitems: [{kind: Pod}, {kind: Service}, 3]")
    assert [entry.data["kind"] for entry in objects] == ["Pod", "Service"]
    assert [str(problem) for problem in problems] == [
        "f: document 1.items[2]: 3: must be a mapping: a Kubernetes object"
    ]


def test_lists_in_lists_are_read_as_deep_as_people_write_them() -> None:
    text = "{kind: Pod}"
    for _ in range(10):
        text = f"{{kind: List, items: [{text}, {{kind: Service}}]}}"
    objects, problems = parse("f", text)
    assert [entry.data["kind"] for entry in objects] == ["Pod", *["Service"] * 10]
    assert problems == []
    objects, problems = parse("f", f"{{kind: List, items: [{text}, {{kind: Node}}]}}")
    assert [entry.data["kind"] for entry in objects] == [*["Service"] * 9, "Node"]
    (problem,) = map(str, problems)
    assert problem.endswith("Lists nest deeper than 10; write their items as one List")


def test_a_list_that_stands_in_itself_ends() -> None:
    twice = ", ".join(["*a"] * 1000)
    objects, problems = parse("f", f"&a {{kind: List, items: [{{kind: Pod}}, {twice}]}}")
    assert [entry.data["kind"] for entry in objects] == ["Pod"]
    assert len(problems) == 1000


def test_a_policy_in_lists_that_nest_too_deep_is_not_taken_for_none(tmp_path: Path) -> None:
    text = "{kind: AuthorizationPolicy, metadata: {namespace: demo}}"
    for _ in range(12):
        text = f"{{kind: List, items: [{text}]}}"
    (tmp_path / "a.yaml").write_text(text)
    _, problems = load(tmp_path)
    assert problems[0].suspects == {"demo"}


def test_json_as_programs_write_it() -> None:
    """Characters beyond ASCII are escaped by many, those beyond 16 bits in halves."""
    said = {"a": "\N{GRINNING FACE}\N{LATIN SMALL LETTER E WITH ACUTE}/", "b": r"\ud83d\ude00 \\"}
    text = json.dumps({"kind": "Service", "metadata": {"annotations": said}})
    objects, problems = parse("f.json", text.replace("/", r"\/"))
    assert problems == []
    assert objects[0].data["metadata"] == {"annotations": said}


def test_times_stay_text() -> None:
    objects, _ = parse("f", "a: 2026-01-02T03:04:05Z\nb: 2026-01-02")
    assert objects[0].data == {"a": "2026-01-02T03:04:05Z", "b": "2026-01-02"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb", "f: line 3, column 1: is not YAML: did not find expected ',' or ']'"),
        ("a: 1\nb: {c: 1, c: 2}", "f: line 2, column 11: is not YAML: key 'c' is given twice"),
        ("- a", "f: document 1: ['a']: must be a mapping: a Kubernetes object"),
        ("--- {}\n--- 7", "f: document 2: 7: must be a mapping: a Kubernetes object"),
        ("kind: List\nitems: none", "f: document 1.items: 'none': must be a mapping"),
        ("a: *b", "f: line 1, column 4: is not YAML: found undefined alias"),
        ("a: !!python/object:os.system x", "f: line 1, column 4: is not YAML: could not determine"),
        ("a: !!int x", "f: is not YAML: invalid literal for int()"),
        ("{[1]: 2, ? {a: b} : c}", "f: line 1, column 2: is not YAML: found unhashable key"),
        ("[" * 500_000, "f: is not YAML: it nests deeper than 100 levels"),
        ("a: " + "{a: " * 500_000, "f: is not YAML: it nests deeper than 100 levels"),
        ("- " * 500_000, "f: is not YAML: it nests deeper than 100 levels"),
        ("a: \x01", "f: is not YAML: unacceptable character"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    _, problems = parse("f", text)
    assert str(problems[0]).startswith(message)
    assert "\n" not in str(problems[0])


def test_every_file_is_tried(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{")
    (tmp_path / "b.yaml").write_bytes(b"a: \xff")
    (tmp_path / "c.yaml").symlink_to(tmp_path / "gone")
    (tmp_path / "d.yaml").symlink_to(tmp_path / "d.yaml")
    (tmp_path / "e.yaml").write_text(POD % "fine")
    objects, problems = load(tmp_path)
    assert len(objects) == 1
    names = [Path(problem.file).name for problem in problems]
    assert names == ["a.yaml", "b.yaml", "c.yaml", "d.yaml"]
    assert "is not UTF-8" in str(problems[1])
    assert "leads nowhere" in str(problems[2])


def test_what_might_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").symlink_to("/dev/zero")
    _, problems = load(tmp_path)
    assert ["is not a regular file" in str(problem) for problem in problems] == [True, True]


def test_a_cluster_of_aliases_is_shown_short() -> None:
    """The billion laughs: nothing here walks the whole tree."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    objects, problems = parse("f", "\n".join(lines) + "\n--- \n- &b [*b]\n")
    assert objects == []
    assert str(problems[0]).startswith("f: document 1: its aliases expand to more than")
    _, problems = parse("f", "- &b [*b]\n" * 3)
    assert len(str(problems[0])) < 200


def test_merge_keys_that_multiply() -> None:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 40)]
    _, problems = parse("f", "\n".join(lines))
    assert "is not YAML: merging makes more than" in str(problems[0])


@pytest.mark.parametrize("path", ["missing", "file"])
def test_no_directory(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"manifests directory .*{path}.*give a directory"):
        load(tmp_path / path)


def test_the_demo_has_no_problems() -> None:
    objects, problems = load(ROOT / "manifests" / "demo")
    assert problems == []
    assert len(objects) == 14


def test_a_file_that_is_the_same_holds_the_same_objects(tmp_path: Path) -> None:
    still, edited = tmp_path / "a.yaml", tmp_path / "b.yaml"
    still.write_text("kind: Pod\n---\nkind: Service\n")
    edited.write_text("kind: Pod\n")
    manifests = Manifests(tmp_path)
    first, _ = manifests.load()
    edited.write_text("kind: Service\n")
    still.write_text(still.read_text())
    second, _ = manifests.load()
    assert [one is other for one, other in zip(first, second, strict=True)] == [True, True, False]
    assert second[2].data == {"kind": "Service"}
    edited.write_text("kind: [\n")
    for _ in range(2):
        kept, problems = manifests.load()
        assert [one is other for one, other in zip(second, kept, strict=True)] == [True] * 3
        assert len(problems) == 1
