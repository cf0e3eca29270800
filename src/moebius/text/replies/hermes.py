"""Hermes' tool calls, which Qwen2.5, Qwen3, Granite 4 and many others write:

<tool_call>
{"name": "f", "arguments": {...}}
</tool_call>
"""

from moebius.text.replies.named_call import named_call
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import Reading
from moebius.text.replies.tools import ToolFormat


class Hermes(ToolFormat):
    name = "hermes"
    in_reasoning = True
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
