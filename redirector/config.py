"""`redirector enroll --config FILE`: what may be said on the command line, as YAML or JSON."""

from difflib import get_close_matches
from pathlib import Path

import yaml

from redirector.errors import InputError
from redirector.options import OPTIONS

#: What is said of a pod beside its steering.
PLACE = ("name", "netns", "cgroup", "mode", "accelerate")
_MOST_BYTES = 16 << 20


def read(path: Path) -> dict[str, str]:
    """Return the file's settings by name, as the command line would have them.

    A list may be a YAML list or a comma string. InputError names the file, the key and the value;
    the values themselves are for `options.parse` to judge.
    """
    try:
        with path.open("rb") as file:
            found = yaml.load(file.read(_MOST_BYTES), Loader=_loader())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file in YAML or JSON") from None
    except RecursionError:
        raise InputError(f"{path}: is neither YAML nor JSON: lists too deep in lists") from None
    except (yaml.YAMLError, ValueError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"{path}: is neither YAML nor JSON: {told}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no keys; write one on each line, such as proxyUID: 1337")
    return {_key(path, key): _text(path, str(key), value) for key, value in found.items()}


_NULL_ONLY = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _loader() -> type[yaml.SafeLoader]:
    class Loader(yaml.SafeLoader):
        """Scalars stay as they are written: to YAML 1.1, 22:30 is 1350 and 010 is 8.

        The last of two equal keys would win without a word. Lists that hold themselves, or grow
        with every alias, are no setting.
        """

        yaml_implicit_resolvers = _NULL_ONLY

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(problem="aliases are not read")
            return super().compose_node(parent, index)

        def construct_mapping(
            self, node: yaml.MappingNode, deep: bool = False
        ) -> dict[object, object]:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(
                        problem="a key must be a word", problem_mark=key.start_mark
                    )
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key.value} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
            return dict(super().construct_mapping(node, deep))

    return Loader


def _key(path: Path, key: object) -> str:
    known = (*PLACE, *(option.name for option in OPTIONS))
    if key in known:
        return str(key)
    names = {name.lower(): name for name in known}
    close = get_close_matches(str(key).lower(), names, n=1)
    hint = f"did you mean {names[close[0]]}?" if close else f"there are {', '.join(known)}"
    raise InputError(f"{path}: {key}: no such key; {hint}")


def _text(path: Path, key: str, value: object) -> str:
    if isinstance(value, list):
        return ",".join(_text(path, key, item) for item in value)
    if isinstance(value, str):
        return value
    what = "has no value" if value is None else f"{value!r} is not a value"
    raise InputError(f"{path}: {key}: {what}; give a word, a number, or a list of them")
