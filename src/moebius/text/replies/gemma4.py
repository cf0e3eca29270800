"""Gemma 4's tool calls, in a notation of its own:

<|tool_call>call:f{key:<|"|>text<|"|>,count:42,list:[1,<|"|>a<|"|>]}<tool_call|>
"""

import json
import re
from collections.abc import Sequence

from moebius.errors import RequestError
from moebius.text.replies.lark import HeldTool, Lark
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import SYMBOLS, NotACall, Reading
from moebius.text.replies.tools import ToolFormat

_DEPTH = 32
_BARE = re.compile(rf"[^,:{{}}\[\]{SYMBOLS}]*")


class Gemma4(ToolFormat):
    name = "gemma4"
    spellings = ("<|tool_call>", "<tool_call|>", '<|"|>')

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        source = reply.source
        yield from source.space()
        yield from source.expect("call:")
        name = yield from source.word()
        arguments = yield from self._object(reply, _DEPTH)
        reply.begin(name)
        reply.argue(json.dumps(arguments, ensure_ascii=False, allow_nan=False))

    def _object(self, reply: ReplyParser, depth: int) -> Reading[dict[str, object]]:
        source = reply.source
        found: dict[str, object] = {}
        yield from source.expect("{")
        more = not (yield from source.accepts("}"))
        while more:
            yield from source.space()
            key = yield from self._text(reply)
            yield from source.expect(":")
            found[key] = yield from self._value(reply, depth)
            yield from source.space()
            more = (yield from source.expect(",", "}")) == ","
        return found

    def _list(self, reply: ReplyParser, depth: int) -> Reading[list[object]]:
        source = reply.source
        found: list[object] = []
        yield from source.expect("[")
        more = not (yield from source.accepts("]"))
        while more:
            found.append((yield from self._value(reply, depth)))
            yield from source.space()
            more = (yield from source.expect(",", "]")) == ","
        return found

    def _value(self, reply: ReplyParser, depth: int) -> Reading[object]:
        if not depth:
            raise NotACall
        quote = self.markers[2]
        yield from reply.source.space()
        if (yield from reply.source.sees("{")):
            return (yield from self._object(reply, depth - 1))
        if (yield from reply.source.sees("[")):
            return (yield from self._list(reply, depth - 1))
        if (yield from reply.source.sees(quote)):
            return (yield from self._text(reply))
        bare = yield from self._text(reply)
        try:
            found: object = json.loads(bare)
        except ValueError:
            raise NotACall from None
        return found

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
        """Not yet: a schema would have to be written out in the notation, value by value."""
        raise RequestError(
            "tools: in this model's format of tool calls (gemma4), whose arguments are in a "
            'notation of its own, calls cannot be held to a grammar yet; use tool_choice "auto" '
            "and leave strict out",
            param="tools",
        )
