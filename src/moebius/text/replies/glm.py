"""GLM's tool calls, from 4.5 on; 4.7 writes them without line breaks:

<tool_call>f
<arg_key>key</arg_key>
<arg_value>value</arg_value>
</tool_call>
"""

from moebius.text.replies.parameters import Parameters
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import NotACall, Reading
from moebius.text.replies.tools import ToolFormat


class Glm(ToolFormat):
    name = "glm"
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
