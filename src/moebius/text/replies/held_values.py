"""A tool's parameters where a format writes them one by one: what a grammar may take for each, so
that the parser makes of it what the schema wants (see `values`)."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moebius.text.replies.lark import ANY, Lark, Schema, literal, one_of
from moebius.text.replies.values import as_json, resolved, types_of

NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "$comment", "readOnly")
)
_KNOWN = ("type", "properties", "required", "additionalProperties")
_ROOT = NOTES.union(_KNOWN, ("$defs", "definitions", "$schema", "$id"))
# Keywords that say nothing of strings, among them.
_OTHERS = "items minItems maxItems minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"
_STRING = NOTES.union(
    _KNOWN, ("minLength", "maxLength", "pattern", "enum", "const"), _OTHERS.split()
)
_BOUNDS = frozenset(_OTHERS.split()[3:]).union(("enum", "const", "allOf", "not"))
_SPACE = r"[\s\x1c-\x1f]*"
# As `as_json` knows them.
_LOOKS = {
    "null": "null",
    "integer": "-?(0|[1-9][0-9]*)",
    "number": r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?",
    "boolean": "(?i:true|false)",
    "object": r"\{(?s:.*)",
    "array": r"\[(?s:.*)",
}
_PYTHON = {
    "boolean": '"True" | "False"',
    "null": '"None"',
    "string": r"/'([^'\\\x00-\x1f]|\\['\"\\nt])*'/",
}
_CONTAINERS = frozenset(("object", "array"))
_ANCHORS = re.compile(r"\\.|\[(?:\\.|[^\]])*\]|[\^$]|\(\?|\n")
_MOST_BRANCHES = 32
_ANY_KEY = "\ufdd0"


@dataclass(frozen=True, slots=True)
class Parameter:
    """needed: it must be there."""

    key: str
    schema: Schema
    needed: bool


def parameters_of(lark: Lark, schema: Schema, keys: re.Pattern[str]) -> list[Parameter] | None:
    """Those of a tool with this schema, in its order; None: any may be there.

    keys: what the format can write of a parameter's name. RequestError for what cannot be held.
    """
    if schema.get("type", "object") != "object":
        raise lark.error("its parameters must be an object")
    for keyword in schema:
        if keyword not in _ROOT:
            lark.refuse(f"{keyword!r} of its parameters")
    properties = schema.get("properties") or {}
    needed = frozenset(schema.get("required") or ())
    if not needed.issubset(properties):
        lark.refuse("a required parameter that is not among its properties")
    if not properties and schema.get("additionalProperties", True) is not False and not lark.strict:
        return None
    found: list[Parameter] = []
    for key, each in properties.items():
        if keys.fullmatch(key) and each is not False:
            found.append(Parameter(key, each if isinstance(each, Mapping) else {}, key in needed))
        elif key in needed:
            lark.refuse(f"a parameter named {key!r}")
    return found


def held_parameters(
    lark: Lark, schema: Schema, keys: re.Pattern[str], write: Callable[[str, Schema], str]
) -> str:
    """The expression of a call's parameters, each as `write` writes it of its name and the schema,
    with a line break behind it or none."""
    found = parameters_of(lark, schema, keys)
    if found is None:
        # Any name, and any value.
        root: Schema = {"properties": {_ANY_KEY: {}}}
        head, key, tail = write(_ANY_KEY, root).partition(_ANY_KEY)
        return f'({head}" /[A-Za-z_][A-Za-z0-9_-]{{0,63}}/ "{tail} "\\n"?)*' if key else ""
    written = ((each, write(each.key, schema)) for each in found)
    return " ".join(f'({text} "\\n"?){"" if each.needed else "?"}' for each, text in written)


@dataclass(frozen=True, slots=True)
class Closer:
    """What stands behind a value.

    trims   the parser takes a line break from either end of a value, and the format writes none
    """

    text: str
    trims: bool = False


def held_value(lark: Lark, key: str, root: Schema, closer: Closer) -> str:
    """The expression of a parameter's value, and of what closes it."""
    types = types_of(root, key)
    schema = resolved(root["properties"][key], root)
    values = _values(schema)
    if values is not None:
        return _listed(lark, values, types, closer)
    if types and "string" not in types:
        return f"{lark.json(_with_definitions(schema, root))} {lark.text(closer.text)}"
    found = []
    containers = [each for each in _branches(schema, root) if _kind(each) in _CONTAINERS]
    if types and containers:
        both = _with_definitions({"anyOf": containers}, root)
        found.append(f"{lark.json(both)} {lark.text(closer.text)}")
    found.append(lark.until(_line(lark, key, root, types, closer), closer.text))
    return one_of(found)


def held_typed(lark: Lark, key: str, root: Schema, closer: str, openers: tuple[str, str]) -> str:
    """The same where the opener says whether the value is a string, or JSON."""
    schema = resolved(root["properties"][key], root)
    branches = list(_branches(schema, root))
    untyped = not types_of(root, key)
    found = []
    for each in branches:
        if untyped or _kind(each) == "string":
            if untyped and not NOTES.issuperset(each):
                lark.refuse(f"the schema of {key!r}, which has no type,")
            found.append(f"{literal(openers[0])} {held_string(lark, each, closer)}")
    others = [each for each in branches if not untyped and _kind(each) != "string"]
    if others:
        value = lark.json(_with_definitions({"anyOf": others}, root))
        found.append(f"{literal(openers[1])} {value} {lark.text(closer)}")
    return one_of(found)


def python_value(lark: Lark, key: str, root: Schema) -> str:
    """A value as JSON, or as Python's literal where that is another."""
    schema = resolved(root["properties"][key], root)
    found = [lark.json(_with_definitions(schema, root))]
    for each in _branches(schema, root):
        if each.get("type") in _PYTHON and NOTES.union(("type",)).issuperset(each):
            found.append(_PYTHON[each["type"]])
    return one_of(dict.fromkeys(found))


def held_string(lark: Lark, schema: Schema, closer: str) -> str:
    """A string that this schema describes, as it is, and what closes it."""
    values = _values(schema)
    if values is not None:
        texts = [each for each in values if isinstance(each, str)]
        return lark.until(one_of(map(literal, texts)), closer)
    return lark.until(string_kind(lark, schema), closer)


def _values(schema: Schema) -> Sequence[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _listed(lark: Lark, values: Sequence[Any], types: frozenset[str], closer: Closer) -> str:
    """One of some values: those that the parser makes of what is written."""
    texts = []
    for value in values:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        read = json.loads(as_json(text, types))
        same = read == value and type(read) is type(value)
        if same and not (closer.trims and text != text.strip("\n")):
            texts.append(text)
    if not texts:
        raise lark.error("none of a parameter's values can be written in this model's format")
    return lark.until(one_of(map(literal, texts)), closer.text)


def _line(lark: Lark, key: str, root: Schema, types: frozenset[str], closer: Closer) -> str:
    """What is no container: strings, and what else there may be, in one terminal."""
    branches = list(_branches(root["properties"][key], root))
    strings = [each for each in branches if _kind(each) == "string"]
    others = types - {"string"} - _CONTAINERS
    if not strings:  # nothing is known of its type
        if any(keyword not in NOTES for each in branches for keyword in each):
            lark.refuse(f"the schema of {key!r}, which has no type,")
        return ANY
    kinds = [_trimmed(string_kind(lark, each), closer) for each in strings]
    text = one_of(kinds)
    for kind in types - {"string"}:
        text = f"({text} & ~/{_SPACE}{_LOOKS[kind]}{_SPACE}/)" if kind in _LOOKS else text
    for each in branches:
        if _kind(each) in others and not _BOUNDS.isdisjoint(each):
            lark.refuse(f"the schema of {key!r}, which may be a string or something else,")
    return one_of([text, *(f"/{_LOOKS[kind]}/" for kind in sorted(others) if kind in _LOOKS)])


def _trimmed(kind: str, closer: Closer) -> str:
    if not closer.trims or kind == ANY:
        return kind
    return rf"({kind} & ~/\n(?s:.*)/ & ~/(?s:.*)\n/)"


def string_kind(lark: Lark, schema: Schema) -> str:
    """The terminal's expression of the strings that a schema describes."""
    values = _values(schema)
    if values is not None:
        return one_of(literal(each) for each in values if isinstance(each, str))
    for keyword in schema:
        if keyword not in _STRING:
            lark.refuse(f"{keyword!r} of a string")
    parts = [ANY]
    least = schema.get("minLength", 0)
    most = schema.get("maxLength", "")
    if least or most != "":
        parts = [f"/(?s:.{{{least},{most}}})/"]
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        parts.append(_pattern(lark, pattern))
    return f"({' & '.join(parts)})" if len(parts) > 1 else parts[0]


def _pattern(lark: Lark, pattern: str) -> str:
    """A pattern that may match anywhere in the text."""
    head = pattern.startswith("^")
    tail = pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[head : len(pattern) - tail]
    inside = [found for found in _ANCHORS.findall(inner) if found in ("^", "$", "(?", "\n")]
    if inside or ((head or tail) and "|" in inner):
        lark.refuse(f"the pattern {pattern!r} of a string")
        return ANY
    inner = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], inner)
    before = "" if head else "(?s:.*)"
    behind = "" if tail else "(?s:.*)"
    return f"/{before}({inner}){behind}/"


def _branches(schema: object, root: Schema, depth: int = 8) -> Iterator[Schema]:
    """A schema's alternatives, each of one type at most."""
    if not isinstance(schema, Mapping) or not depth:
        return
    schema = resolved(schema, root)
    for several in ("anyOf", "oneOf"):
        if isinstance(schema.get(several), list):
            for branch in schema[several][:_MOST_BRANCHES]:
                yield from _branches(branch, root, depth - 1)
            return
    kinds = schema.get("type")
    if isinstance(kinds, list):
        for kind in kinds:
            yield {**schema, "type": kind}
    else:
        yield schema


def _kind(schema: Schema) -> object:
    values = _values(schema)
    if "type" not in schema and values and all(isinstance(each, str) for each in values):
        return "string"
    return schema.get("type")


def _with_definitions(schema: Schema, root: Schema) -> Schema:
    """The schema, in which references to the root's definitions are such, too."""
    return {**schema, **{name: root[name] for name in ("$defs", "definitions") if name in root}}
