"""StructuredOutput: what the text of an answer is to be, as a client says it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moebius.errors import RequestError

_KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """Exactly one of json, json_object, regex, choice and grammar; names are vLLM's. Or calls: what
    a reply is held to that must call tools, which this server itself writes.

    json        a JSON Schema, as an object or as its text, by which it is kept
    json_object any JSON object
    regex       matches all of the text; no look-around, back-references or lazy quantifiers
    choice      the text is one of these
    grammar     in llguidance's dialect of Lark, or GBNF, where it has `::=`
    whitespace_pattern       what may stand between two tokens of JSON; default: little
    disable_any_whitespace   nothing may
    calls       in llguidance's dialect of Lark
    whole       the calls' grammar is that of all the reply, its reasoning included
    strict      keywords of a schema that are not held to are an error; else they count for nothing
    param       the field that it came in, for errors
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    calls: str | None = None
    whole: bool = False
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    strict: bool = True
    param: str = "structured"

    def __post_init__(self) -> None:
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", self._text(self.json))
        if not isinstance(self.choice, str):
            object.__setattr__(self, "choice", tuple(self.choice or ()))
        self._check_types()
        given = [
            name for name in (*_KINDS, "calls") if getattr(self, name) not in (None, False, ())
        ]
        if len(given) != 1:
            found = f"{self.param} has {' and '.join(given)}" if given else f"{self.param} is empty"
            raise self.error(f"{found}; it must have exactly one of {', '.join(_KINDS)}")

    def error(self, message: str) -> RequestError:
        return RequestError(message, param=self.param)

    @property
    def schema(self) -> str | None:
        """The JSON Schema's text; that of an object for json_object; None for what is no JSON."""
        if self.json_object:
            return '{"type": "object"}'
        assert not isinstance(self.json, Mapping), "it is kept as its text"
        return self.json

    def _text(self, schema: Mapping[str, Any]) -> str:
        try:
            return json.dumps(dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise self.error(f"{self.param}: this schema is no JSON: {error}") from error

    def _check_types(self) -> None:
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                what = "an object or its text" if name == "json" else "a text"
                raise self.error(f"{self.param}: {name} must be {what} that is not empty")
        for name in ("json_object", "disable_any_whitespace", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise self.error(f"{self.param}: {name} must be true or false")
        if not isinstance(self.choice, tuple) or not all(
            isinstance(each, str) for each in self.choice
        ):
            raise self.error(f"{self.param}: choice must be a list of texts")
