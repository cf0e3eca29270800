"""DeepSeek's tool calls, V3 and R1:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
```json
{...}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

V3.1 writes <｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜>.
"""

from collections.abc import Sequence

from moebius.text.replies.lark import HeldTool, Lark, Schema
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import NotACall, Reading
from moebius.text.replies.tools import ToolFormat

_FENCE = "```"


class DeepSeek(ToolFormat):
    """V3, R1."""

    name = "deepseek-v3"
    # R1 may leave the first one out.
    spellings = (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    )
    num_starters = 2

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        begins, call_begins, _, call_ends, _ = self.markers
        source = reply.source
        if starter == begins:
            yield from source.space()
            yield from source.expect(call_begins)
        while True:
            yield from self._call(reply)
            reply.end()
            yield from source.closes(call_ends)
            if not (yield from source.closes(call_begins)):
                return

    def _call(self, reply: ReplyParser) -> Reading[None]:
        *_, call_ends, separator = self.markers
        source = reply.source
        _, found = yield from source.text_until(separator, call_ends)
        if found != separator:
            raise NotACall
        name, _ = yield from source.text_until("\n")
        yield from source.space()
        yield from source.expect(f"{_FENCE}json")
        yield from reply.arguments(name.strip(), _FENCE, call_ends)
        yield from source.closes(_FENCE)

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        begins, call_begins, closer, call_ends, _ = self.markers

        def call(name: str, schema: Schema) -> str:
            return f"{self._held_call(lark, name, lark.arguments(schema))} {lark.text(call_ends)}"

        one = lark.calls(tools, call)
        opener = f"{lark.text(call_begins)} "
        more = f'("\\n"? {opener} {one})*' if several else ""
        if starter == begins:
            return f'"\\n"? {opener} {one} {more} "\\n"? {lark.text(closer)}'
        return f'{one} {more} ("\\n"? {lark.text(closer)})?'

    def _held_call(self, lark: Lark, name: str, arguments: str) -> str:
        *_, separator = self.markers
        head = lark.text(f"function{separator}{name}\n{_FENCE}json\n")
        return f"{head} {arguments} {lark.text(chr(10) + _FENCE)}"


class DeepSeekV31(DeepSeek):
    """V3.1."""

    name = "deepseek-v3.1"

    def _call(self, reply: ReplyParser) -> Reading[None]:
        *_, call_ends, separator = self.markers
        name, found = yield from reply.source.text_until(separator, call_ends)
        if found != separator:
            raise NotACall
        yield from reply.arguments(name.strip(), call_ends)

    def _held_call(self, lark: Lark, name: str, arguments: str) -> str:
        *_, separator = self.markers
        return f"{lark.text(name + separator)} {arguments}"
