"""Mistral's tool calls: [TOOL_CALLS]f[ARGS]{...}, repeated, from the 11th tokenizer on, and before
that [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]."""

from collections.abc import Sequence

from moebius.text.replies.call_ids import short_id
from moebius.text.replies.lark import HeldTool, Lark, Schema, one_of, repeated
from moebius.text.replies.named_call import held_call, named_call
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import NotACall, Reading
from moebius.text.replies.tools import ToolFormat


class Mistral(ToolFormat):
    name = "mistral"
    repeats = True
    spellings = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def call_id(self, key: str, index: int) -> str:
        """Nine letters and digits: the templates insist on it."""
        return short_id(key, index, 9)

    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        yield from reply.source.space()
        if (yield from reply.source.peek()) == "[":
            yield from self._list(reply)
        else:
            yield from self._named(reply)

    def _named(self, reply: ReplyParser) -> Reading[None]:
        start, arguments, given_id = self.markers
        source = reply.source
        name = yield from source.word()
        call_id: str | None = None
        if (yield from source.accepts(given_id)):
            call_id, found = yield from source.text_until(arguments, start)
            if found != arguments:
                raise NotACall
        else:
            yield from source.accepts(arguments)
        yield from reply.arguments(name, start, id=call_id)
        reply.end()

    def _list(self, reply: ReplyParser) -> Reading[None]:
        source = reply.source
        yield from source.expect("[")
        while True:
            yield from source.space()
            yield from named_call(reply, "]")
            reply.end()
            yield from source.space()
            if (yield from source.accepts(",", "]")) != ",":
                return

    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        """As all tokenizers have it: which one of them this is, the model knows."""
        _, arguments, given_id = map(lark.text, self.markers)

        def call(name: str, schema: Schema) -> str:
            id = f"{given_id} /[a-zA-Z0-9]{{9}}/"
            return f"{lark.text(name)} (({id})? {arguments})? {lark.arguments(schema)}"

        def entry(name: str, schema: Schema) -> str:
            return held_call(lark, name, "arguments", lark.arguments(schema))

        listed = repeated(lark.calls(tools, entry), '", "', several=several)
        return one_of((lark.calls(tools, call), f'" "? "[" {listed} "]"'))
