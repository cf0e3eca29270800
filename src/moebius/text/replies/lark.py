"""Lark: a grammar of tool calls as it is written, in llguidance's dialect of Lark.

Texts are a source's: a control token is its symbol, and stands in the grammar by its id. So what a
model spells by ordinary tokens is no marker to the grammar, as it is none to the parser.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moebius.errors import RequestError
from moebius.text.grammar import JSON_WHITESPACE, TOOL, check_schema
from moebius.text.replies.source import SYMBOLS

Schema = Mapping[str, Any]
TokenOf = Callable[[str], int | None]
"""The id of a marker that is a token."""

_PIECES = re.compile(rf"[{SYMBOLS}]|[^{SYMBOLS}]+")
ANY = "/(?s:.*)/"
_NOTES = frozenset(("title", "description", "examples", "default", "$comment"))
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_KEPT = frozenset(("enum", "const", "required"))


@dataclass(frozen=True, slots=True)
class HeldTool:
    """A tool that may be called.

    strict   what its schema says that cannot be held is an error; else it counts for nothing
    """

    name: str
    schema: Schema
    strict: bool = True


class Lark:
    """Rules and terminals, which a format's expressions refer to."""

    def __init__(self, token_of: TokenOf) -> None:
        self._token_of = token_of
        self._rules: list[str] = []
        self._tool = ""
        self.strict = True
        """Of the tool at hand."""

    def calls(self, tools: Iterable[HeldTool], write: Callable[[str, Schema], str]) -> str:
        """A call of any of these, which `write` writes of name and schema."""
        found = []
        for tool in tools:
            self._tool = tool.name
            self.strict = tool.strict
            self._rules.append(f"{TOOL}{tool.name}")
            check_schema(tool.schema, self.error)
            found.append(self.rule(write(tool.name, bare_schema(tool.schema)), "call"))
        return one_of(found)

    def __str__(self) -> str:
        return "\n".join(self._rules)

    def refuse(self, what: str) -> None:
        """RequestError for what cannot be held, where it must be."""
        if self.strict:
            raise self.error(f"{what} cannot be held to in this model's format of tool calls")

    def error(self, message: str) -> RequestError:
        return RequestError(f"tools: {self._tool}: {message}", param="tools")

    def text(self, text: str) -> str:
        """The expression of a text."""
        return " ".join(map(self._piece, _PIECES.findall(text)))

    def _piece(self, piece: str) -> str:
        token_id = self._token_of(piece)
        return literal(piece) if token_id is None else f"<[{token_id}]>"

    def rule(self, body: str, hint: str = "r") -> str:
        """The name of a new rule."""
        name = f"{hint}{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def ahead(self, write: Callable[[str], str]) -> str:
        """The name of a new rule whose body, which `write` makes of that name, may refer to it."""
        place = len(self._rules)
        name = f"a{place}"
        self._rules.append("")
        self._rules[place] = f"{name}: {write(name)}"
        return name

    def terminal(self, body: str) -> str:
        """The name of a new terminal."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _first(self, value: str, end: str) -> str:
        """The shortest text that is of this kind but for the end behind it."""
        terminal = self.terminal(value)
        name = f"t{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: {terminal} {literal(end)}")
        return name

    def start(self, body: str) -> None:
        self._rules.append(f"start: {body}")

    def json(self, schema: Schema) -> str:
        """A value that a JSON Schema describes, in JSON."""
        options = {"lenient": not self.strict, "whitespace_pattern": JSON_WHITESPACE}
        return self.rule(f"%json {json.dumps({**schema, 'x-guidance': options})}", "j")

    def arguments(self, schema: Schema) -> str:
        """A call's arguments as a JSON object."""
        if schema.get("type", "object") != "object":
            raise self.error("its parameters must be an object")
        return self.json({"type": "object", **schema})

    def behind(self, marker: str, before: str = ANY) -> str:
        """A text of this kind, which holds no marker, and a marker behind it."""
        head, *tokens = _PIECES.findall(marker)
        if self._token_of(head) is not None:
            free = self.terminal(before)
            return f"{free}? {self.text(marker)}"
        if not tokens:
            return self._first(before, head)
        ended = self.terminal(f"{before} {literal(head)}")
        return f"{ended} {self.text(''.join(tokens))}"

    def until(self, value: str, closer: str) -> str:
        """A text of this kind and the closer behind it, which it does not hold."""
        head, *tokens = _PIECES.findall(closer)
        if self._token_of(head) is not None:
            # Terminals are never empty.
            free = value.strip("(").startswith((ANY, "/(?s:.{0,")) and " & /" not in value
            may_be_empty = "?" if free else ""
            return f"{self.terminal(value)}{may_be_empty} {self.text(closer)}"
        if tokens:
            return f"{self.terminal(f'({value}) {literal(head)}')} {self.text(''.join(tokens))}"
        without = f"~({ANY} {literal(head.lstrip())} {ANY})"
        return self._first(f"({value}) & {without}", head)


def bare_schema(schema: Schema) -> dict[str, Any]:
    """The schema without what it tells its readers alone, which may be long."""
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            found[key] = {name: _bare(each) for name, each in value.items()}
        elif key in _KEPT:
            found[key] = value
        elif key not in _NOTES:
            found[key] = (
                [_bare(each) for each in value] if isinstance(value, list) else _bare(value)
            )
    return found


def _bare(schema: object) -> object:
    return bare_schema(schema) if isinstance(schema, Mapping) else schema


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def one_of(expressions: Iterable[str]) -> str:
    return f"({' | '.join(expressions)})"


def repeated(item: str, separator: str, *, several: bool) -> str:
    """An item, or several with separators between them."""
    return f"{item} ({separator} {item})*" if several else item


def in_order(lark: Lark, items: Sequence[tuple[str, bool]], separator: str) -> str:
    """Items in their order with a separator between any two; each with whether it must be there."""
    # Of what is left, with nothing in front of it and with something.
    first = rest = ""
    for item, needed in reversed(items):
        behind = lark.rule(f"{separator} {item} {rest}" + ("" if needed else f" | {rest}"), "m")
        first = lark.rule(f"{item} {rest}" + ("" if needed else f" | {first}"), "m")
        rest = behind
    return first
