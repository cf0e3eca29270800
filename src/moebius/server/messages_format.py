"""/v1/messages: a reply's events as Anthropic's content blocks, and as the events of its stream."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import msgspec

from moebius.server.answer import NamedEvents
from moebius.server.blocks import Begin, Blocks, End, Kind, Piece, Step
from moebius.server.dialects import anthropic_error
from moebius.server.faults import Fault
from moebius.server.messages_bodies import MessagesChat
from moebius.server.objects import object_of
from moebius.server.stream import Call, News

Json = dict[str, Any]

# Anthropic signs reasoning, and clients send it back with its signature; here nobody looks at it.
_SIGNATURE = "unsigned"
_NAMES = {"reasoning": "thinking", "content": "text"}


class MessagesFormat:
    """One message: its stream, or the whole of it; both are made of the same steps."""

    def __init__(self, call: Call, request: MessagesChat, model: str) -> None:
        self.id = f"msg_{call.id.rpartition('-')[2]}"
        self._call = call
        self._model = model
        self._shows_thinking = request.shows_thinking
        self._blocks = Blocks()
        self._begun = False
        self._content: list[Json] = []
        self._kind: Kind = "content"
        self._text: list[str] = []

    def chunks(self, news: News) -> list[Json]:
        """What a stream sends; its beginning even where there are no news."""
        found = [] if self._begun else [self._start()]
        self._begun = True
        for _, delta in news:
            found += self._written(self._blocks.feed(delta.events))
        return found

    def closing(self) -> list[Json]:
        delta = {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        return [*self._rest(), delta, {"type": "message_stop"}]

    def whole(self) -> Iterator[bytes]:
        """The message that is not streamed."""
        events = self._call.choices[0].assembler.released.events
        for _ in (*self._written(self._blocks.feed(events)), *self._rest()):
            pass  # what a stream would have said; it leaves the content behind
        message = {**self._message(), **self._end(), "usage": self._usage()}
        yield msgspec.json.encode(message)

    def _message(self) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": self._content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _start(self) -> Json:
        message = {**self._message(), "content": [], "usage": self._usage()}
        return {"type": "message_start", "message": message}

    def _rest(self) -> list[Json]:
        """What is still open ends; a message without a word has an empty text."""
        found = list(self._written(self._blocks.close()))
        if not self._content:
            found += self._written((Begin("content"), End()))
        return found

    def _written(self, steps: Iterable[Step]) -> Iterator[Json]:
        for step in steps:
            match step:
                case Begin():
                    yield self._opened(step)
                case Piece(text):
                    yield from self._more(text)
                case End():
                    yield from self._closed()

    def _opened(self, begin: Begin) -> Json:
        self._kind = begin.kind
        self._text = []
        block: Json
        if begin.call is not None:
            block = {"type": "tool_use", "id": begin.call.id, "name": begin.call.name, "input": {}}
        elif begin.kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self._content.append(dict(block))
        return self._of_block("start", content_block=block)

    def _more(self, text: str) -> Iterator[Json]:
        hidden = self._kind == "reasoning" and not self._shows_thinking
        if not text or hidden:
            return
        self._text.append(text)
        if self._kind == "call":
            delta = {"type": "input_json_delta", "partial_json": text}
        else:
            name = _NAMES[self._kind]
            delta = {"type": f"{name}_delta", name: text}
        yield self._of_block("delta", delta=delta)

    def _closed(self) -> Iterator[Json]:
        block = self._content[-1]
        text = "".join(self._text)
        if self._kind == "call":
            block["input"] = object_of(text)
        else:
            block[_NAMES[self._kind]] = text
        if self._kind == "reasoning":
            block["signature"] = _SIGNATURE
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            yield self._of_block("delta", delta=delta)
        yield self._of_block("stop")

    def _of_block(self, what: str, **fields: Json) -> Json:
        """About the block that is open, by its place in the content."""
        return {
            "type": f"content_block_{what}",
            "index": len(self._content) - 1,
            **fields,
        }

    def _end(self) -> Json:
        """Why there is no more of it."""
        read = self._call.choices[0].assembler
        if read.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if read.num_calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(read.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": read.stop_reason}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _usage(self) -> Json:
        """So far. Claude Code adds up the three kinds of input: together they are the prompt."""
        cached = self._call.cached_tokens
        read = self._call.choices[0].assembler
        return {
            "input_tokens": self._call.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._call.completion_tokens,
            "output_tokens_details": {"thinking_tokens": read.num_reasoning_tokens},
        }


class MessagesAnswer(NamedEvents):
    """One message to a client of Anthropic's."""

    keep_alive: ClassVar = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(
        self, call: Call, formatter: MessagesFormat, stream: bool, request_id: str
    ) -> None:
        super().__init__(call, formatter, stream)
        self._request_id = request_id

    def told(self, fault: Fault) -> object:
        return anthropic_error(fault, self._request_id)
