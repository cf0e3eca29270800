"""/v1/responses: a reply's events as the items of a response, and as the events of its stream."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from moebius.server.answer import NamedEvents
from moebius.server.blocks import Begin, Blocks, End, Piece, Step
from moebius.server.faults import Fault
from moebius.server.formats import scored
from moebius.server.responses_bodies import SEALED, ResponsesChat
from moebius.server.responses_items import (
    CallItem,
    CustomCallItem,
    Events,
    Item,
    ReasoningItem,
    TextItem,
)
from moebius.server.stream import Call, News
from moebius.text import Tokenizer

Json = dict[str, Any]

# What Codex tells apart; whatever else it is, the server failed.
_ERROR_CODES = {
    "context_length_exceeded": "context_length_exceeded",
    "overloaded": "server_is_overloaded",
    "draining": "server_is_overloaded",
}


class ResponsesFormat:
    """One response: its stream, or the whole of it; both are made of the same steps."""

    def __init__(
        self, call: Call, request: ResponsesChat, tokenizer: Tokenizer, model: str
    ) -> None:
        self._hex = call.id.rpartition("-")[2]
        self.id = f"resp_{self._hex}"
        self._call = call
        self._request = request
        self._tokenizer = tokenizer
        self._model = model
        self._created = int(time.time())
        self._blocks = Blocks()
        self._items: list[Item] = []
        self._sent = 0

    def chunks(self, news: News) -> list[Json]:
        """What a stream sends; its beginning even where there are no news."""
        found: list[Json] = []
        if not self._sent:
            for kind in ("created", "in_progress"):
                found.append(self._event(kind, {"response": self._response("in_progress")}))
        for _, delta in news:
            found += self._written(self._blocks.feed(delta.events))
        return found

    def closing(self) -> list[Json]:
        rest = list(self._written(self._blocks.close(), cut=self._is_cut))
        response = self._ended()
        return [*rest, self._event(response["status"], {"response": response})]

    def whole(self) -> Iterator[bytes]:
        """The response that is not streamed."""
        events = self._call.choices[0].assembler.released.events
        for _ in self._written(self._blocks.feed(events)):
            pass  # what a stream would have said; it leaves the items behind
        for _ in self._written(self._blocks.close(), cut=self._is_cut):
            pass
        yield msgspec.json.encode(self._ended())

    def failed(self, fault: Fault) -> Json:
        """What a stream says that fails."""
        code = _ERROR_CODES.get(fault.code or "", "server_error")
        error = {"code": code, "message": fault.message}
        return self._event("failed", {"response": self._response("failed", error=error)})

    @property
    def _is_cut(self) -> bool:
        return self._call.choices[0].assembler.finish_reason == "length"

    def _event(self, kind: str, fields: Json) -> Json:
        event = {"type": f"response.{kind}", "sequence_number": self._sent, **fields}
        self._sent += 1
        return event

    def _written(self, steps: Iterable[Step], *, cut: bool = False) -> Iterator[Json]:
        """cut: what ends, ends by the reply's length."""
        for step in steps:
            match step:
                case Begin():
                    self._items.append(self._item(step))
                    item = self._items[-1]
                    yield self._of_item("output_item.added", dict(item.shown))
                    yield from self._inside(item.opened())
                case Piece(text, tokens):
                    yield from self._inside(self._items[-1].more(text, self._scores(tokens)))
                case End():
                    item = self._items[-1]
                    yield from self._inside(item.closed(cut=cut))
                    yield self._of_item("output_item.done", item.shown)

    def _scores(self, tokens: Iterable[int]) -> list[msgspec.Raw]:
        """The log-probabilities of these, where they were asked for: as JSON, which takes less
        memory until the end than what it is made of."""
        known = self._call.choices[0].assembler.output_logprobs
        top = self._call.params.logprobs or 0
        entries = scored((known[token] for token in tokens), self._tokenizer, top)
        return [msgspec.Raw(msgspec.json.encode(entry)) for entry in entries]

    def _item(self, begin: Begin) -> Item:
        id = f"{self._hex}{len(self._items):04d}"
        if begin.kind == "reasoning":
            return ReasoningItem(id, seals=SEALED in self._request.sent.include)
        if begin.call is None:
            return TextItem(id)
        tool = self._request.toolbox.of(begin.call.name)
        kind = CustomCallItem if tool.custom else CallItem
        return kind(id, begin.call, tool)

    def _of_item(self, kind: str, item: Json) -> Json:
        return self._event(kind, {"output_index": len(self._items) - 1, "item": item})

    def _inside(self, events: Events) -> Iterator[Json]:
        """Events of the item that is open."""
        place = {
            "item_id": self._items[-1].shown["id"],
            "output_index": len(self._items) - 1,
        }
        for kind, fields in events:
            yield self._event(kind, {**place, **fields})

    def _ended(self) -> Json:
        fields: Json = {
            "output": [item.shown for item in self._items],
            "usage": self._usage(),
            "completed_at": int(time.time()),
        }
        if not self._is_cut:
            return self._response("completed", **fields)
        details = {"reason": "max_output_tokens"}
        return self._response("incomplete", incomplete_details=details, **fields)

    def _response(self, status: str, **fields: object) -> Json:
        """The response; `fields` are those that its end has."""
        sent = self._request.sent
        params = self._call.params
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": sent.instructions,
            "max_output_tokens": sent.max_output_tokens,
            "max_tool_calls": sent.max_tool_calls,
            "metadata": sent.metadata,
            "model": self._model,
            "output": [],
            "parallel_tool_calls": sent.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": sent.reasoning.get("effort"), "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}, **sent.text},
            "tool_choice": sent.tool_choice,
            "tools": self._request.toolbox.kept,
            "top_logprobs": sent.top_logprobs,
            "top_p": params.top_p,
            "truncation": sent.truncation,
            "usage": None,
            **fields,
        }

    def _usage(self) -> Json:
        call = self._call
        reasoning = call.choices[0].assembler.num_reasoning_tokens
        return {
            "input_tokens": call.prompt_tokens,
            "input_tokens_details": {"cached_tokens": call.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": call.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": call.prompt_tokens + call.completion_tokens,
        }


class ResponsesAnswer(NamedEvents):
    """One response to a client."""

    repeats = True

    def __init__(self, call: Call, formatter: ResponsesFormat, stream: bool) -> None:
        super().__init__(call, formatter, stream)
        self._response = formatter

    def told(self, fault: Fault) -> object:
        return self._response.failed(fault)
