"""Kimi K2's tool calls, whose ids are part of the text and count over the whole conversation:

<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}
<|tool_call_end|><|tool_calls_section_end|>
"""

import re
from collections.abc import Sequence

from moebius.text.replies.lark import HeldTool, Lark, Schema, repeated
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import NotACall, Reading
from moebius.text.replies.tools import ToolFormat

_ID = re.compile(r"(?:functions\.)?(.+?):[0-9]+")


class Kimi(ToolFormat):
    name = "kimi"
    spellings = (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    )

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        _, _, begins, argument_begins, ends = self.markers
        source = reply.source
        yield from source.space()
        yield from source.expect(begins)
        while True:
            text, found = yield from source.text_until(argument_begins, ends)
            if found != argument_begins:
                raise NotACall
            call_id = text.strip()
            named = _ID.fullmatch(call_id)
            name = call_id if named is None else named[1]
            yield from reply.arguments(name, ends, id=None if named is None else call_id)
            reply.end()
            yield from source.closes(ends)
            if not (yield from source.closes(begins)):
                return

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        _, closer, begins, argument_begins, ends = self.markers

        def call(name: str, schema: Schema) -> str:
            head = f"{lark.text(f'{begins}functions.{name}:')} /[0-9]{{1,4}}/"
            return f"{head} {lark.text(argument_begins)} {lark.arguments(schema)} {lark.text(ends)}"

        calls = repeated(lark.calls(tools, call), "", several=several)
        return f"{calls} {lark.text(closer)}"
