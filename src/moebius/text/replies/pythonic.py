"""Calls written as Python's: [f(a="x", b=1), g()], by Llama 4 and 3.2 as they are, by LFM2 between
markers, by OLMo 3 a line each between markers. Values are literals: nothing is computed."""

import ast
import json
import re
from collections.abc import Callable, Sequence

from moebius.text.replies.held_values import parameters_of, python_value
from moebius.text.replies.lark import HeldTool, Lark, Schema, in_order, repeated
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import SYMBOLS, WORD, NotACall, Reading, Source
from moebius.text.replies.tools import ToolFormat

# What of a literal's text needs no look at its nesting.
_PLAIN = re.compile(rf"[^'\"()\[\]{{}},{SYMBOLS}]+")
_UNQUOTED = {quote: re.compile(rf"[^{quote}\\\n{SYMBOLS}]*") for quote in "'\""}
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


class Pythonic(ToolFormat):
    """Llama 4, Llama 3.2."""

    name = "pythonic"
    spellings = ("<|python_start|>", "<|python_end|>")
    bare = "["

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        source = reply.source
        yield from source.space()
        yield from source.expect("[")
        yield from source.space()
        while True:
            yield from _call(reply)
            yield from source.space()
            if (yield from source.accepts(",", "]")) != ",":
                return
            yield from source.space()

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        calls = repeated(lark.calls(tools, _held_call(lark)), '", "', several=several)
        closer = lark.text(self.closers[0]) if starter else ""
        return f'"[" {calls} "]" {closer}'


class Lfm2(Pythonic):
    """LFM2."""

    name = "lfm2"
    spellings = ("<|tool_call_start|>", "<|tool_call_end|>")
    bare = ""


class Olmo3(ToolFormat):
    """OLMo 3: a call a line."""

    name = "olmo3"
    spellings = ("<function_calls>", "</function_calls>")

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        (close,) = self.closers
        source = reply.source
        while True:
            yield from source.space()
            yield from _call(reply)
            if (yield from source.closes(close)) or not (yield from source.peek()):
                return

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        calls = repeated(lark.calls(tools, _held_call(lark)), '"\\n"', several=several)
        return f'"\\n"? {calls} "\\n"? {lark.text(self.closers[0])}'


def _held_call(lark: Lark) -> Callable[[str, Schema], str]:
    """What writes a call in a grammar."""

    def parameter(key: str, root: Schema) -> str:
        return f"{lark.text(f'{key}=')} {python_value(lark, key, root)}"

    def call(name: str, schema: Schema) -> str:
        found = parameters_of(lark, schema, WORD) or ()
        items = [(lark.rule(parameter(each.key, schema)), each.needed) for each in found]
        return f'{lark.text(f"{name}(")} {in_order(lark, items, chr(34) + ", " + chr(34))} ")"'

    return call


def _call(reply: ReplyParser) -> Reading[None]:
    """Read one call, f(key=literal, ...)."""
    source = reply.source
    name = yield from source.word()
    yield from source.expect("(")
    arguments: dict[str, object] = {}
    yield from source.space()
    more = not (yield from source.accepts(")"))
    while more:
        key = yield from source.word()
        yield from source.space()
        yield from source.expect("=")
        arguments[key] = _value((yield from _literal(source)))
        more = (yield from source.expect(",", ")")) == ","
        yield from source.space()
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise NotACall from None
    reply.begin(name)
    reply.argue(written)
    reply.end()


def _literal(source: Source) -> Reading[str]:
    """The text up to the comma or the bracket behind it."""
    pieces: list[str] = []
    open: list[str] = []
    while True:
        char = yield from source.peek()
        if char in ("'", '"'):
            pieces.append((yield from _quoted(source)))
        elif char in _BRACKETS and char:
            open.append(_BRACKETS[char])
            pieces.append(source.take(1))
        elif open and char == open[-1]:
            open.pop()
            pieces.append(source.take(1))
        elif char == "," and open:
            pieces.append(source.take(1))
        elif char in (",", ")"):
            return "".join(pieces)
        else:
            plain = _PLAIN.match(source.text)
            if plain is None:
                raise NotACall
            pieces.append(source.take(len(plain[0])))


def _quoted(source: Source) -> Reading[str]:
    """A string with its quotes."""
    quote = source.take(1)
    pieces = [quote]
    while True:
        pieces.append((yield from source.matching(_UNQUOTED[quote])))
        char = yield from source.peek()
        if char == "\\":
            while len(source.text) < 2 and not source.ended:
                yield
            pieces.append(source.take(2))
        elif char == quote:
            pieces.append(source.take(1))
            return "".join(pieces)
        else:
            raise NotACall


def _value(text: str) -> object:
    """What a literal is, Python's or JSON's. NotACall where it is none."""
    bare = text.strip()
    for read in (json.loads, ast.literal_eval):
        try:
            found: object = read(bare)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return found
    raise NotACall
