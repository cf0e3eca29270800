"""DeepSeek's tool calls, V3 and R1:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
```json
{...}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

V3.1 writes <｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜>.
"""

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


class DeepSeekV31(DeepSeek):
    """V3.1."""

    name = "deepseek-v3.1"

    def _call(self, reply: ReplyParser) -> Reading[None]:
        *_, call_ends, separator = self.markers
        name, found = yield from reply.source.text_until(separator, call_ends)
        if found != separator:
            raise NotACall
        yield from reply.arguments(name.strip(), call_ends)
