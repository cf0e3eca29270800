"""Llama 3's tool calls: JSON, which a token may announce, and several with semicolons between.

<|python_tag|>{"name": "f", "parameters": {...}}; {"name": "g", "parameters": {...}}
"""

from moebius.text.replies.named_call import named_call
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
