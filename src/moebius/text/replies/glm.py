"""GLM's tool calls, from 4.5 on; 4.7 writes them without line breaks:

<tool_call>f
<arg_key>key</arg_key>
<arg_value>value</arg_value>
</tool_call>
"""

import re
from collections.abc import Sequence

from moebius.text.replies.held_values import Closer, held_parameters, held_value
from moebius.text.replies.lark import HeldTool, Lark, Schema
from moebius.text.replies.parameters import Parameters
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import NotACall, Reading
from moebius.text.replies.tools import ToolFormat

# It is stripped.
_KEY = re.compile(r"[^\s<](?:[^<]*[^\s<])?")


class Glm(ToolFormat):
    name = "glm"
    repeats = True
    spellings = (
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    )

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        _, close, key_opens, key_closes, value_opens, value_closes = self.markers
        source = reply.source
        yield from source.space()
        name, found = yield from source.text_until("\n", key_opens, close)
        if found == "\n":
            yield from source.space()
            found = yield from source.expect(key_opens, close)
        if not found:
            raise NotACall
        reply.begin(name.strip())
        parameters = Parameters(reply, name.strip())
        while found == key_opens:
            key, _ = yield from source.text_until(key_closes)
            yield from source.space()
            yield from source.expect(value_opens)
            yield from parameters.read(key.strip(), value_closes, parameters.types(key.strip()))
            yield from source.space()
            found = yield from source.expect(key_opens, close)
        parameters.close()
        reply.end()

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        _, close, *_, value_closes = self.markers

        def parameter(key: str, root: Schema) -> str:
            _, _, key_opens, key_closes, value_opens, _ = self.markers
            head = f'{lark.text(key_opens + key + key_closes)} "\\n"? {lark.text(value_opens)}'
            return f"{head} {held_value(lark, key, root, Closer(value_closes))}"

        def call(name: str, schema: Schema) -> str:
            body = held_parameters(lark, schema, _KEY, parameter)
            return f'{lark.text(name)} "\\n"? {body} {lark.text(close)}'

        return lark.calls(tools, call)
