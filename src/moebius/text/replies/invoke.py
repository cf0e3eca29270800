"""Calls that are invoked: MiniMax's, and DeepSeek's from V3.2 on ("DSML").

<minimax:tool_call>
<invoke name="f">
<parameter name="key">value</parameter>
</invoke>
</minimax:tool_call>

DSML writes each tag as <｜DSML｜invoke ...>, and says of each parameter whether it is a string:
string="true" or string="false", which is JSON.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from moebius.text.replies.held_values import Closer, held_parameters, held_typed, held_value
from moebius.text.replies.lark import HeldTool, Lark, Schema, repeated
from moebius.text.replies.parameters import Parameters
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import Markers, Reading
from moebius.text.replies.tools import ToolFormat

_BAR = "｜DSML｜"
_STRING = frozenset(("string",))
_JSON: frozenset[str] = frozenset()
_KEY = re.compile(r'[^"<>]+')


class Invoke(ToolFormat):
    """MiniMax."""

    name = "minimax"
    spellings = ("<minimax:tool_call>", "</minimax:tool_call>")
    prefix: ClassVar[str] = ""

    def __init__(self, markers: Markers) -> None:
        super().__init__(markers)
        bar = markers(self.prefix) if self.prefix else ""
        self._invoke = f'<{bar}invoke name="'
        self._end_invoke = f"</{bar}invoke>"
        self._parameter = f'<{bar}parameter name="'
        self._end_parameter = f"</{bar}parameter>"

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        source = reply.source
        yield from source.space()
        yield from source.expect(self._invoke)
        while True:
            yield from self._call(reply)
            if not (yield from source.closes(self._invoke)):
                return

    def _call(self, reply: ReplyParser) -> Reading[None]:
        source = reply.source
        name, _ = yield from source.text_until('"')
        yield from source.expect(">")
        yield from source.space()
        found = yield from source.expect(self._parameter, self._end_invoke)
        reply.begin(name)
        parameters = Parameters(reply, name)
        while found == self._parameter:
            key, _ = yield from source.text_until('"')
            attributes, _ = yield from source.text_until(">")
            types = self._types(parameters, key, attributes)
            line = not self.prefix
            yield from parameters.read(key, self._end_parameter, types, line=line)
            yield from source.space()
            found = yield from source.expect(self._parameter, self._end_invoke)
        parameters.close()
        reply.end()

    def _types(self, parameters: Parameters, key: str, attributes: str) -> frozenset[str]:
        """What a value is, which may say so itself."""
        if 'string="true"' in attributes:
            return _STRING
        if 'string="false"' in attributes:
            return parameters.types(key) - _STRING or _JSON
        return parameters.types(key)

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        def parameter(key: str, root: Schema) -> str:
            return lark.text(f'{self._parameter}{key}"') + " " + self._held(lark, key, root)

        def call(name: str, schema: Schema) -> str:
            body = held_parameters(lark, schema, _KEY, parameter)
            head = lark.text(f'{self._invoke}{name}">')
            return f'{head} "\\n"? {body} {lark.text(self._end_invoke)} "\\n"?'

        calls = repeated(lark.calls(tools, call), "", several=several)
        return f'"\\n"? {calls} {lark.text(self.closers[0])}'

    def _held(self, lark: Lark, key: str, root: Schema) -> str:
        """A parameter's value, and what is round it, behind its name."""
        return '">" ' + held_value(lark, key, root, Closer(self._end_parameter, trims=True))


class _Dsml(Invoke):
    prefix = _BAR
    tag: ClassVar[str]

    def __init__(self, markers: Markers) -> None:
        super().__init__(markers)
        bar = markers(_BAR)
        if len(self.markers[0]) > 1:  # no token of its own
            self.starters = (f"<{bar}{self.tag}>",)
            self.closers = (f"</{bar}{self.tag}>",)

    def _held(self, lark: Lark, key: str, root: Schema) -> str:
        closer = self._end_parameter
        return held_typed(lark, key, root, closer, (' string="true">', ' string="false">'))


class Dsml(_Dsml):
    """DeepSeek V3.2."""

    name = "dsml"
    tag = "function_calls"
    spellings = (f"<{_BAR}{tag}>", f"</{_BAR}{tag}>")


class DsmlV4(_Dsml):
    """DeepSeek V4."""

    name = "dsml-v4"
    tag = "tool_calls"
    spellings = (f"<{_BAR}{tag}>", f"</{_BAR}{tag}>")
