"""A call's arguments where a format has a notation of its own for JSON's values: the grammar of
those that a schema describes.

The notation is JSON's without blanks, but that strings stand between the format's own quotes, and
keys without any: {city:<|"|>Rome<|"|>,days:[1,2]}. llguidance knows JSON alone, so a schema is
written out here, rule by rule; numbers are as in JSON and are left to it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moebius.text.replies.held_values import NOTES, held_string
from moebius.text.replies.lark import ANY, Lark, Schema, in_order, literal, one_of
from moebius.text.replies.values import TYPE_NAMES, referred

_WORD = re.compile(r"[\w.-]+")
_ANY_WORD = "/[A-Za-z_][A-Za-z0-9_-]{0,63}/"
_COMMA = literal(",")
_ANY_DEPTH = 4
"""So deep is a value of which its schema says nothing."""
_TOP = NOTES | {"type", "$defs", "definitions", "$schema", "$id"}
_OBJECT = _TOP | {"properties", "required", "additionalProperties"}
_ARRAY = _TOP | {"items", "minItems", "maxItems"}
# What a schema without a type describes, by its keywords. It takes other types, too, which nobody
# means.
_MEANT = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


class HeldNotation:
    """Values in the notation, for the references of one root."""

    def __init__(self, lark: Lark, root: Schema, quote: str) -> None:
        """quote: what stands on either side of a string."""
        self._lark = lark
        self._root = root
        self._quote = quote
        self._references: dict[str, str] = {}
        self._anything: dict[int, str] = {}

    def value(self, schema: object) -> str:
        """The expression of the values that a schema describes. RequestError for what cannot be
        held."""
        if schema is False:
            raise self._lark.error("a part of its parameters can have no value")
        if not isinstance(schema, Mapping):
            return self._any(_ANY_DEPTH)
        if "$ref" in schema:
            self._knows(schema, _TOP | {"$ref"})
            return self._referred(schema["$ref"])
        branches = self._branches(schema)
        if branches is not None:
            return one_of(map(self.value, branches))
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            self._knows(schema, _TOP | {"enum", "const"})
            return self._one_of(values, schema.get("type"))
        return self._of_type(schema)

    def _referred(self, reference: object) -> str:
        """The rule of a schema that others refer to, which may hold such references itself."""
        schema = referred(reference, self._root)
        if not isinstance(reference, str) or schema is None:
            raise self._lark.error(f"$ref {reference!r} names nothing in its parameters")

        def write(name: str) -> str:
            self._references[str(reference)] = name
            return self.value(schema)

        return self._references.get(reference) or self._lark.ahead(write)

    def _branches(self, schema: Schema) -> Sequence[object] | None:
        """A schema's alternatives; None: it has none."""
        for several in ("anyOf", "oneOf", "allOf"):
            branches = schema.get(several)
            if not isinstance(branches, list) or not branches:
                continue
            self._knows(schema, _TOP - {"type"} | {several})
            if several == "oneOf" and not _are_apart(branches):
                self._lark.refuse("'oneOf' of schemas that are not of different types")
            if several == "allOf" and len(branches) > 1:
                self._lark.refuse("'allOf' of several schemas")
            return branches
        types = schema.get("type")
        return [{**schema, "type": each} for each in types] if isinstance(types, list) else None

    def _of_type(self, schema: Schema) -> str:
        kind = schema.get("type") or _meant(schema)
        if kind == "object":
            return self._object(schema)
        if kind == "array":
            return self._array(schema)
        if kind == "string":
            return f"{self._lark.text(self._quote)} {held_string(self._lark, schema, self._quote)}"
        if kind == "boolean":
            return '("true" | "false")'
        if kind == "null":
            return '"null"'
        if kind in ("integer", "number"):
            return self._lark.json({"type": kind, **schema})
        self._knows(schema, _TOP)
        return self._any(_ANY_DEPTH)

    def _object(self, schema: Schema) -> str:
        self._knows(schema, _OBJECT)
        properties = schema.get("properties") or {}
        needed = frozenset(schema.get("required") or ())
        if not needed.issubset(properties):
            self._lark.refuse("a required property that is not among the properties")
        others = schema.get("additionalProperties", True)
        if not properties and others is not False:
            return self._map(self.value(others))
        items = [
            (self._lark.rule(f"{self._key(key)} {self.value(each)}", "p"), key in needed)
            for key, each in properties.items()
            if each is not False or key in needed
        ]
        return f'"{{" {in_order(self._lark, items, _COMMA)} "}}"'

    def _map(self, value: str) -> str:
        """An object of which only its values are known."""
        pair = self._lark.rule(f'{_ANY_WORD} ":" {value}', "p")
        return f'"{{" ({pair} ("," {pair})*)? "}}"'

    def _array(self, schema: Schema) -> str:
        self._knows(schema, _ARRAY)
        least = self._count(schema, "minItems", 0)
        most = self._count(schema, "maxItems", None)
        items = schema.get("items", True)
        if items is False or most == 0:
            if least:
                raise self._lark.error("an array among its parameters can have no items")
            return '"[" "]"'
        assert least is not None
        item = self._lark.rule(self.value(items), "i")
        more = self._more(item, max(least, 1) - 1, None if most is None else most - 1)
        return f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"'

    def _more(self, item: str, least: int, most: int | None) -> str:
        """So many further items, each behind a comma."""
        if most == 0:
            return ""
        return f"({_COMMA} {item}){{{least},{'' if most is None else most}}}"

    def _count(self, schema: Schema, keyword: str, default: int | None) -> int | None:
        found = schema.get(keyword, default)
        if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
            raise self._lark.error(f"{keyword} is {found!r}; it must be a whole number")
        return found

    def _any(self, depth: int) -> str:
        """A value that has so many levels."""
        if depth not in self._anything:
            text = self._lark.text(self._quote)
            found = [
                f"{text} {self._lark.until(ANY, self._quote)}",
                self._lark.json({"type": ["number", "boolean", "null"]}),
            ]
            if depth:
                inner = self._any(depth - 1)
                found += [f'"[" ({inner} ("," {inner})*)? "]"', self._map(inner)]
            self._anything[depth] = self._lark.rule(one_of(found), "v")
        return self._anything[depth]

    def _one_of(self, values: Sequence[Any], kind: object) -> str:
        kinds = (
            None if kind is None else frozenset(kind if isinstance(kind, list) else (str(kind),))
        )
        found = [self._written(each) for each in values if kinds is None or _is(each, kinds)]
        if not found:
            raise self._lark.error("none of the values of an 'enum' is of its type")
        return one_of(found)

    def _written(self, value: object) -> str:
        """One value."""
        if isinstance(value, str):
            return self._quoted(value)
        if isinstance(value, list):
            return _between("[", map(self._written, value), "]")
        if isinstance(value, Mapping):
            pairs = (f"{self._key(key)} {self._written(each)}" for key, each in value.items())
            return _between("{", pairs, "}")
        return literal(json.dumps(value))

    def _key(self, key: str) -> str:
        """A key and the colon behind it."""
        return literal(f"{key}:") if _WORD.fullmatch(key) else f'{self._quoted(key)} ":"'

    def _quoted(self, text: str) -> str:
        if self._quote in text:
            raise self._lark.error(f"{text!r} holds this model's quote")
        quote = self._lark.text(self._quote)
        return f"{quote} {literal(text)} {quote}" if text else f"{quote} {quote}"

    def _knows(self, schema: Schema, known: frozenset[str]) -> None:
        for keyword in schema:
            if keyword not in known:
                self._lark.refuse(f"{keyword!r}")


def _between(opener: str, items: Iterable[str], closer: str) -> str:
    """Items with a comma between any two."""
    return f"{literal(opener)} {f' {_COMMA} '.join(items)} {literal(closer)}"


def _meant(schema: Schema) -> str | None:
    found = (kind for kind, words in _MEANT.items() if any(word in schema for word in words))
    return next(found, None)


def _is(value: object, kinds: frozenset[str]) -> bool:
    kind = TYPE_NAMES.get(type(value))
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _are_apart(branches: Sequence[object]) -> bool:
    """Whether no value is of two of these."""
    kinds = [kind for each in branches for kind in _kinds(each)]
    numbers = {"integer", "number"}.issubset(kinds)
    return None not in kinds and len(set(kinds)) == len(kinds) and not numbers


def _kinds(schema: object) -> Iterator[object]:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    yield from kind if isinstance(kind, list) else (kind,)
