"""Qwen3-Coder's tool calls, which Qwen3.5 and later, Nemotron 3 and Seed-OSS write as well:

<tool_call>
<function=f>
<parameter=key>
value
</parameter>
</function>
</tool_call>
"""

from collections.abc import Sequence

from moebius.text.replies.held_values import Closer, held_parameters, held_value
from moebius.text.replies.lark import HeldTool, Lark, Schema
from moebius.text.replies.parameters import Parameters
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import WORD, Reading
from moebius.text.replies.tools import ToolFormat

_FUNCTION = "<function="
_END_FUNCTION = "</function>"
_PARAMETER = "<parameter="
_END_PARAMETER = "</parameter>"


class QwenXml(ToolFormat):
    name = "qwen-xml"
    # Some leave the first one out.
    repeats = True
    spellings = ("<tool_call>", _FUNCTION, "</tool_call>")
    num_starters = 2
    in_reasoning = True

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        source = reply.source
        function = self.markers[1]
        if starter != function:
            yield from source.space()
            yield from source.expect(function)
        while True:
            yield from self._call(reply)
            if not (yield from source.closes(function)):
                return

    def _call(self, reply: ReplyParser) -> Reading[None]:
        source = reply.source
        name = yield from source.word()
        yield from source.expect(">")
        yield from source.space()
        found = yield from source.expect(_PARAMETER, _END_FUNCTION)
        reply.begin(name)
        parameters = Parameters(reply, name)
        while found == _PARAMETER:
            key = yield from source.word()
            yield from source.expect(">")
            yield from parameters.read(key, _END_PARAMETER, parameters.types(key), line=True)
            yield from source.space()
            found = yield from source.expect(_PARAMETER, _END_FUNCTION)
        parameters.close()
        reply.end()

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        function = self.markers[1]
        closer = Closer(f"\n{_END_PARAMETER}")

        def parameter(key: str, root: Schema) -> str:
            return f'{lark.text(f"{_PARAMETER}{key}>")} "\\n" {held_value(lark, key, root, closer)}'

        def call(name: str, schema: Schema) -> str:
            head = lark.text(f"{name}>")
            body = held_parameters(lark, schema, WORD, parameter)
            return f'{head} "\\n"? {body} {lark.text(_END_FUNCTION)}'

        calls = f'{lark.calls(tools, call)} "\\n"? {lark.text(self.closers[0])}'
        return calls if starter == function else f'"\\n"? {lark.text(function)} {calls}'


class SeedXml(QwenXml):
    """Seed-OSS: the same between other markers."""

    name = "seed-xml"
    spellings = ("<seed:tool_call>", _FUNCTION, "</seed:tool_call>")
