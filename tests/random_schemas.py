"""Random JSON schemas, of the kinds that clients send."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("id", "name", "größe", "a b", 'q"q', "n", "x1", "日本", "tags", "unit")


def random_schema(rng: random.Random) -> dict[str, Any]:
    """An object, whose properties may refer to a list of its own kind."""
    schema = _object(rng, 3)
    if rng.random() < 0.3:
        schema["$defs"] = {
            "node": {
                "type": "object",
                "properties": {
                    "value": _scalar(rng),
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        }
        schema["properties"]["list"] = {"$ref": "#/$defs/node"}
        schema["required"].append("list")
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.random()
    if depth <= 0 or kind < 0.5:
        return _scalar(rng)
    if kind < 0.7:
        return _object(rng, depth)
    if kind < 0.85:
        least = rng.randrange(3)
        return {
            "type": "array",
            "items": _any(rng, depth - 1),
            "minItems": least,
            "maxItems": least + rng.randrange(3),
        }
    return {"anyOf": [_any(rng, depth - 1), {"type": "null"}]}


def _scalar(rng: random.Random) -> dict[str, Any]:
    low = rng.randrange(-50, 50)
    return rng.choice(
        (
            {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 2000)},
            {"type": "integer", "multipleOf": rng.randrange(2, 9), "minimum": 0, "maximum": 999},
            {"type": "number", "exclusiveMinimum": low, "maximum": low + 7.5},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": rng.randrange(1, 12)},
            {"type": "string", "minLength": 2, "maxLength": 5},
            {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$", "maxLength": 10},
            {"type": "string", "format": "date"},
            {"enum": rng.sample([1, "one", None, True, 2.5, "zwölf"], rng.randrange(1, 5))},
            {"const": rng.choice(["fixed", 7, None])},
        )
    )
