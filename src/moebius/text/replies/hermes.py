"""Hermes' tool calls, which Qwen2.5, Qwen3, Granite 4 and many others write:

<tool_call>
{"name": "f", "arguments": {...}}
</tool_call>
"""

from collections.abc import Sequence

from moebius.text.replies.lark import HeldTool, Lark, Schema
from moebius.text.replies.named_call import held_call, named_call
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import Reading
from moebius.text.replies.tools import ToolFormat


class Hermes(ToolFormat):
    name = "hermes"
    in_reasoning = True
    repeats = True
    spellings = ("<tool_call>", "</tool_call>")

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        more = True
        while more:
            yield from reply.source.space()
            yield from named_call(reply, *self.closers)
            reply.end()
            yield from reply.source.space()
            # Some write several in one pair of markers.
            more = (yield from reply.source.peek()) == "{"

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        def call(name: str, schema: Schema) -> str:
            return held_call(lark, name, "arguments", lark.arguments(schema))

        closer = lark.text(self.closers[0])
        return f'"\\n"? {lark.calls(tools, call)} "\\n"? {closer}'
