"""Llama 3's tool calls: JSON, which a token may announce, and several with semicolons between.

<|python_tag|>{"name": "f", "parameters": {...}}; {"name": "g", "parameters": {...}}
"""

from collections.abc import Sequence

from moebius.text.replies.lark import HeldTool, Lark, Schema, repeated
from moebius.text.replies.named_call import held_call, named_call
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import Reading
from moebius.text.replies.tools import ToolFormat


class Llama3(ToolFormat):
    name = "llama3"
    spellings = ("<|python_tag|>",)
    bare = "{"

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        more = True
        while more:
            yield from reply.source.space()
            yield from named_call(reply, whole=True)
            reply.end()
            more = bool((yield from reply.source.closes(";")))

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        def call(name: str, schema: Schema) -> str:
            return held_call(lark, name, "parameters", lark.arguments(schema))

        return repeated(lark.calls(tools, call), '"; "', several=several)
