"""Reads manifests from a directory: YAML or JSON, several documents a file, `List` objects too."""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from redirector.errors import InputError
from xds_server.errors import Problem, shown
from xds_server.sources.objects import KubeObject

_MAX_DEPTH = 100
#: Far more than an object that a Kubernetes API server would take.
_MAX_VALUES = 1_000_000
_MAX_KEYS = 100_000
#: Of a `List` in a `List` in a `List`.
_MAX_LISTS = 10
SUFFIXES = frozenset({".yaml", ".yml", ".json"})
#: What stands in decoded text for bytes that are no character.
_REPLACED = "\N{REPLACEMENT CHARACTER}"
_MAX_BYTES = 32 << 20
# No scalar can hold such a line (YAML 1.2, 9.1.2).
_DOCUMENT = re.compile(r"^---(?=\s|$)", re.MULTILINE)
#: A character beyond 16 bits as JSON escapes it, in two halves, which YAML does not know.
_HALVES = re.compile(
    r"(?<!\\)((?:\\\\)*)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE
)
_NAMESPACE = re.compile(r"""\bnamespace["']?\s*:\s*["']?([a-z0-9][-a-z0-9]*)""")
_LIST = "List"
_TEXT = "tag:yaml.org,2002:str"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.CSafeLoader):
    """Safe YAML, with what Kubernetes has and YAML 1.1 has not: times stay text, and a key given
    twice is an error, because the policy a reader sees must be the one that holds."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: tuple[bool, bool]) -> str:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _TEXT if tag == _TIMESTAMP else tag

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def descend_resolver(self, _node: yaml.Node | None, _index: Any) -> None:
        """Called at each node. libyaml's recursion knows no limit and would end the process."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it nests deeper than {_MAX_DEPTH} levels")

    def ascend_resolver(self) -> None:
        self._depth -= 1

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<) copy what they name, each time."""
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            raise yaml.constructor.ConstructorError(
                None, None, f"merging makes more than {_MAX_KEYS} keys", node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class Manifests:
    """A directory's *.yaml, *.yml and *.json files (not in folders below, not hidden ones). While a
    file cannot be read, what it last held stays; one whose text is the same holds the same objects,
    to their identity."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._good: dict[str, list[KubeObject]] = {}
        #: By file: its text's hash, and what was in it.
        self._parsed: dict[str, tuple[bytes, list[KubeObject], list[Problem]]] = {}

    def load(self) -> tuple[list[KubeObject], list[Problem]]:
        """Every object, by file name and place, and what could not be read. Of a file that never
        could be, the documents that can. Raises InputError when there is no such directory."""
        objects: list[KubeObject] = []
        problems: list[Problem] = []
        good: dict[str, list[KubeObject]] = {}
        before, self._parsed = self._parsed, {}
        for path in self._paths():
            file = str(path)
            text, wrong = _text(path)
            if text is None and wrong is None:
                continue
            wrong = wrong or self._emptied(file, text)
            read, unreadable = (
                ([], [wrong]) if wrong else self._parse(file, text or "", before.get(file))
            )
            if not unreadable:
                good[file] = read
            elif file in self._good:
                read = good[file] = self._good[file]
            else:
                read, suspects = _what_can_be_read(file, text or "")
                unreadable[0] = replace(unreadable[0], suspects=frozenset(suspects))
            objects += read
            problems += unreadable
        self._good = good
        return objects, problems

    def _emptied(self, file: str, text: str | None) -> Problem | None:
        """A shell empties what it is about to write, and a program may take long to write it."""
        if text or not self._good.get(file):
            return None
        message = "is empty, as if about to be written; what it held stays: remove it to drop that"
        return Problem(file, "", "", "", message)

    def _parse(
        self,
        file: str,
        text: str,
        before: tuple[bytes, list[KubeObject], list[Problem]] | None,
    ) -> tuple[list[KubeObject], list[Problem]]:
        digest = blake2b(text.encode()).digest()
        known = before if before and before[0] == digest else (digest, *parse(file, text))
        self._parsed[file] = known
        return known[1], list(known[2])

    def _paths(self) -> list[Path]:
        try:
            return sorted(
                path
                for path in self._directory.iterdir()
                if path.suffix in SUFFIXES and not path.name.startswith(".") and not path.is_dir()
            )
        except OSError as error:
            raise InputError(
                f"manifests directory {str(self._directory)!r}: {error.strerror}; "
                "give a directory to read"
            ) from error


def load(directory: Path) -> tuple[list[KubeObject], list[Problem]]:
    """What a directory holds, read for once."""
    return Manifests(directory).load()


def _text(path: Path) -> tuple[str | None, Problem | None]:
    """A file's text, as far as there is any, and what is wrong; neither for one that is gone."""

    def wrong(message: str, place: str = "", *, opaque: bool = False) -> Problem:
        return Problem(str(path), "", place, "", message, opaque=opaque)

    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            # Reading a pipe or a device may never end.
            return None, wrong("is not a regular file; remove it")
        if state.st_size > _MAX_BYTES:
            return None, wrong(f"is larger than {_MAX_BYTES >> 20} MiB; split it", opaque=True)
        data = path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            return None, wrong(f"leads nowhere: {os.readlink(path)}; correct or remove the link")
        return None, None  # renamed away since it was listed, as editors do
    except OSError as error:
        return None, wrong(f"cannot be read: {error.strerror}", opaque=True)
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        text = data.decode(errors="replace")
        return text, wrong("is not UTF-8; save it as UTF-8", f"byte {error.start}")


def _what_can_be_read(file: str, text: str) -> tuple[list[KubeObject], set[str]]:
    """The objects in those documents of a text that can be read, and the namespaces that policies
    in the others may be for: at worst there is no telling more than that one is there."""
    objects: list[KubeObject] = []
    suspects: set[str] = set()
    for document in _DOCUMENT.split(text):
        read, unreadable = parse(file, document)
        if not unreadable and _REPLACED not in document:
            objects += read
        elif "AuthorizationPolicy" in document:
            suspects.update(_NAMESPACE.findall(document) or ["default"])
    return objects, suspects


def parse(file: str, text: str) -> tuple[list[KubeObject], list[Problem]]:
    """The objects in one file's text. After a syntax error the rest of the file is unreadable."""
    objects: list[KubeObject] = []
    problems: list[Problem] = []
    if file.endswith(".json"):
        text = _HALVES.sub(_joined, text)
    documents: Iterator[Any] = yaml.load_all(text, _Loader)
    index = 0
    while True:
        try:
            document = next(documents)
        except StopIteration:
            return objects, problems
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            problems.append(Problem(file, "", where, "", f"is not YAML: {error.problem}"))
            return objects, problems
        except (yaml.YAMLError, ValueError) as error:
            problems.append(Problem(file, "", "", "", f"is not YAML: {error}"))
            return objects, problems
        if _values(document, {}) > _MAX_VALUES:
            message = f"its aliases expand to more than {_MAX_VALUES} values; write fewer"
            problems.append(Problem(file, "", f"document {index + 1}", "", message))
            return objects, problems
        for field, value in _expanded(f"document {index + 1}", document):
            if not isinstance(value, dict):
                problems.append(
                    Problem(file, "", field, shown(value), "must be a mapping: a Kubernetes object")
                )
            elif value.get("kind") == _LIST:
                message = f"Lists nest deeper than {_MAX_LISTS}; write their items as one List"
                problems.append(Problem(file, "", field, "", message))
            else:
                objects.append(KubeObject(file, value))
        index += 1


def _joined(found: re.Match[str]) -> str:
    before, high, low = found.groups()
    return before + chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))


def _values(value: object, known: dict[int, int]) -> int:
    """How many values a reader of the document meets, which with aliases may be exponentially more
    than were written. An alias to what it stands in counts once."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 1
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] += sum(_values(part, known) for part in parts)
    return known[id(value)]


def _expanded(field: str, document: object) -> Iterator[tuple[str, object]]:
    """A `List`, as kubectl writes it, stands for its items, some of which may be Lists; an empty
    document for nothing. A List that stands too deep comes as it is."""
    if document is not None:
        yield from _items(field, document, ())


def _items(field: str, value: object, above: tuple[int, ...]) -> Iterator[tuple[str, object]]:
    """`above` are the Lists that it stands in; with aliases it may be one of them."""
    if (
        not isinstance(value, dict)
        or value.get("kind") != _LIST
        or len(above) == _MAX_LISTS
        or id(value) in above
    ):
        yield field, value
        return
    items = value.get("items")
    if not isinstance(items, list):
        yield f"{field}.items", items
        return
    for number, item in enumerate(items):
        yield from _items(f"{field}.items[{number}]", item, (*above, id(value)))
