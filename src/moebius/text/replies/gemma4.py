"""Gemma 4's tool calls, in a notation of its own:

<|tool_call>call:f{key:<|"|>text<|"|>,count:42,list:[1,<|"|>a<|"|>]}<tool_call|>
"""

import json
import re
from collections.abc import Sequence

from moebius.text.replies.held_notation import HeldNotation
from moebius.text.replies.json_text import SCALAR
from moebius.text.replies.lark import HeldTool, Lark, Schema
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import SYMBOLS, NotACall, Reading
from moebius.text.replies.tools import ToolFormat

_DEPTH = 100
_BARE = re.compile(rf"[^,:{{}}\[\]{SYMBOLS}]*")


class Gemma4(ToolFormat):
    name = "gemma4"
    spellings = ("<|tool_call>", "<tool_call|>", '<|"|>')
    repeats = True

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        source = reply.source
        yield from source.space()
        yield from source.expect("call:")
        name = yield from source.word()
        arguments = yield from self._object(reply, _DEPTH)
        reply.begin(name)
        reply.argue(arguments)

    def _object(self, reply: ReplyParser, depth: int) -> Reading[str]:
        """What is read here and below is returned as JSON's text."""
        source = reply.source
        found: dict[str, str] = {}
        yield from source.expect("{")
        more = not (yield from source.accepts("}"))
        while more:
            yield from source.space()
            key = yield from self._text(reply)
            yield from source.expect(":")
            found[_json(key)] = yield from self._value(reply, depth)
            yield from source.space()
            more = (yield from source.expect(",", "}")) == ","
        return f"{{{', '.join(f'{key}: {value}' for key, value in found.items())}}}"

    def _list(self, reply: ReplyParser, depth: int) -> Reading[str]:
        source = reply.source
        found: list[str] = []
        yield from source.expect("[")
        more = not (yield from source.accepts("]"))
        while more:
            found.append((yield from self._value(reply, depth)))
            yield from source.space()
            more = (yield from source.expect(",", "]")) == ","
        return f"[{', '.join(found)}]"

    def _value(self, reply: ReplyParser, depth: int) -> Reading[str]:
        if not depth:
            raise NotACall
        quote = self.markers[2]
        yield from reply.source.space()
        if (yield from reply.source.sees("{")):
            return (yield from self._object(reply, depth - 1))
        if (yield from reply.source.sees("[")):
            return (yield from self._list(reply, depth - 1))
        if (yield from reply.source.sees(quote)):
            return _json((yield from self._text(reply)))
        bare = yield from self._text(reply)
        if SCALAR.fullmatch(bare) is None:
            raise NotACall
        return bare

    def _text(self, reply: ReplyParser) -> Reading[str]:
        """A string between quotes, or a bare word."""
        source = reply.source
        quote = self.markers[2]
        if (yield from source.accepts(quote)):
            text, found = yield from source.text_until(quote)
            if not found:
                raise NotACall
            return reply.spell(text)
        return (yield from source.matching(_BARE)).strip()

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        _, closer, quote = self.markers

        def call(name: str, schema: Schema) -> str:
            arguments = HeldNotation(lark, schema, quote).value({"type": "object", **schema})
            return f"{lark.text(f'call:{name}')} {arguments} {lark.text(closer)}"

        return lark.calls(tools, call)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
