"""What an API server does with an object of one of our kinds: schema, defaults, CEL rules."""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import re2
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[ValidationError]:
    """Kubernetes matches with RE2."""
    if isinstance(value, str) and not re2.search(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern}")


_Validator = validators.extend(Draft202012Validator, {"pattern": _pattern})

CRDS = Path(__file__).parents[3] / "manifests" / "crds"


@cache
def schema_of(kind: str, part: str = "spec") -> dict[str, Any]:
    """The OpenAPI schema of a part of a kind."""
    for path in CRDS.glob("*.yaml"):
        crd = yaml.safe_load(path.read_text())
        if crd["spec"]["names"]["kind"] == kind:
            schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
            return dict(schema["properties"][part])
    raise AssertionError(f"no CustomResourceDefinition of {kind}")


def refusals(kind: str, content: Any, part: str = "spec") -> list[str]:
    """Why the API server would refuse the object; unknown fields as `kubectl` asks it to."""
    schema = schema_of(kind, part)
    whole = _defaulted(deepcopy(content), schema)
    found = [error.message for error in _Validator(schema).iter_errors(whole)]
    found += _unknown(whole, schema, part)
    # Rules are evaluated only for what has the right shape.
    return found or list(_broken_rules(whole, schema))


def _defaulted(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key not in value and "default" in inner:
                value[key] = inner["default"]
            if key in value:
                value[key] = _defaulted(value[key], inner)
    elif isinstance(value, list) and "items" in schema:
        return [_defaulted(entry, schema["items"]) for entry in value]
    return value


def _unknown(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    found = []
    if isinstance(value, dict):
        for key, inner in value.items():
            known = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if known is None:
                found.append(f"unknown field {path}.{key}")
            else:
                found += _unknown(inner, known, f"{path}.{key}")
    elif isinstance(value, list):
        for entry in value:
            found += _unknown(entry, schema.get("items", {}), path)
    return found


def _broken_rules(value: Any, schema: dict[str, Any]) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if not _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)}):
            yield rule["message"]
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key in value:
                yield from _broken_rules(value[key], inner)
    elif isinstance(value, list):
        for entry in value:
            yield from _broken_rules(entry, schema["items"])


@cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))
