"""From the text of a parameter, as XML-like formats have it, to JSON, by the tool's schema."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
TYPE_NAMES: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}
# References and alternatives are followed so deep.
_DEPTH = 8

Schema = Mapping[str, Any]


def types_of(parameters: Schema, key: str) -> frozenset[str]:
    """The types that a tool's schema allows for one of its parameters; empty where it does not
    say."""
    properties = parameters.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(found, parameters, _DEPTH))


def _types(schema: object, root: Schema, depth: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or not depth:
        return
    named = schema.get("type")
    for each in named if isinstance(named, list) else [named]:
        if isinstance(each, str):
            yield each
    values = schema.get("enum")
    constant = [schema["const"]] if "const" in schema else []
    if named is None:
        for value in [*(values if isinstance(values, list) else []), *constant]:
            yield TYPE_NAMES.get(type(value), "string")
    yield from _types(referred(schema.get("$ref"), root), root, depth - 1)
    for several in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(several)
        for branch in branches if isinstance(branches, list) else []:
            yield from _types(branch, root, depth - 1)


def resolved(schema: object, root: Schema) -> Schema:
    """What a schema that refers to another one inside the root's means."""
    for _ in range(_DEPTH):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            break
        schema = referred(schema["$ref"], root)
    return schema if isinstance(schema, Mapping) else {}


def referred(reference: object, root: Schema) -> object:
    """What a reference inside the schema names."""
    found: object = root
    if reference == "#":
        return found
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def as_json(text: str, types: frozenset[str]) -> str:
    """A parameter's text as JSON of one of these types: the first of null, integer, number,
    boolean, object or array that it is; else a string.

    Where no type is known it is what it looks like, but for null.
    """
    bare = text.strip()
    known = types or {"integer", "number", "boolean", "object", "array"}
    if "null" in known and bare == "null":
        return "null"
    if "integer" in known and _INTEGER.fullmatch(bare):
        return bare
    if "number" in known and _NUMBER.fullmatch(bare):
        return bare
    if "boolean" in known and bare.lower() in ("true", "false"):
        return bare.lower()
    if known & {"object", "array"} and bare[:1] in ("{", "["):
        value = _parsed(bare)
        if TYPE_NAMES.get(type(value)) in known:
            return bare
    return json.dumps(text, ensure_ascii=False)


def _parsed(text: str) -> object:
    """The value of a JSON text; None where it is none."""
    try:
        found: object = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found


def _refuse(constant: str) -> None:
    """NaN and infinities are no JSON."""
    raise ValueError(constant)
