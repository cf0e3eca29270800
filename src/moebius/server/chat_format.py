"""/v1/chat/completions: a reply's events as OpenAI's messages and deltas."""

from collections.abc import Iterable, Sequence

from moebius.engine.client import TokenLogprob
from moebius.front.assemble import Delta
from moebius.server.formats import Format, Json, encoded_list, scored
from moebius.server.protocol import ChatRequest
from moebius.server.stream import LiveChoice
from moebius.text.replies import CallArguments, CallStart, Content, Event, Reasoning, Said, fold


class ChatFormat(Format):
    """/v1/chat/completions.

    A stream's deltas concatenate to the message that is not streamed: both are made of the same
    events.
    """

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    _request: ChatRequest

    def _prepare(self) -> None:
        self._one_tool = self._request.conversation.choice.one

    def _beside(self) -> Json:
        first = self._call.choices[0]
        return {
            **self._ids("prompt_token_ids", first.request.prompt_ids),
            **self._prompt_logprobs(first),
        }

    def _choice(self, choice: LiveChoice, said: Delta) -> Json:
        return {
            "message": self._message(fold([*self._echoed(), *said.events])),
            "logprobs": self._logprobs(said.logprobs),
            **self._common(choice, said),
        }

    def _message(self, said: Said) -> Json:
        """Content is null where all was reasoning or calls."""
        silent = said.reasoning is not None or bool(said.calls)
        content = said.content if silent or said.content is not None else ""
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if said.reasoning is not None:
            message |= self._reasoning(said.reasoning)
        if said.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in said.calls
            ]
        return message

    def _echoed(self) -> list[Content]:
        """What the client wants back before what is new."""
        return [Content(self._request.echoed)] if self._request.echoed else []

    def _reasoning(self, text: str) -> Json:
        """Under both names that clients know."""
        if not self._request.include_reasoning:
            return {}
        return {"reasoning_content": text, "reasoning": text}

    def _says(self, delta: Delta) -> bool:
        return any(self._delta(event) for event in delta.events)

    def _chunks(self, choice: LiveChoice, delta: Delta, *, first: bool) -> Iterable[Json]:
        if first:
            role = {"role": "assistant", "content": ""}
            opening = {
                "index": choice.index,
                "delta": role,
                "logprobs": None,
                "finish_reason": None,
            }
            ids = self._ids("prompt_token_ids", choice.request.prompt_ids)
            yield self._chunk(opening, **ids, **self._running_usage(choice))
            for echo in self._echoed():
                piece = {**opening, "delta": {"content": echo.text}}
                yield self._chunk(piece, **self._running_usage(choice))
        *earlier, last = self._deltas(delta.events)
        for said in earlier:
            piece = {
                "index": choice.index,
                "delta": said,
                "logprobs": None,
                "finish_reason": None,
            }
            yield self._chunk(piece, **self._running_usage(choice))
        piece = {
            "delta": last,
            "logprobs": self._logprobs(delta.logprobs),
            **self._common(choice, delta),
        }
        yield self._chunk(piece, **self._running_usage(choice, delta))

    def _deltas(self, events: Sequence[Event]) -> list[Json]:
        """One for each event that the client hears of; at least one."""
        return [said for event in events if (said := self._delta(event))] or [{}]

    def _delta(self, event: Event) -> Json:
        match event:
            case Reasoning(text):
                return self._reasoning(text)
            case Content(text):
                return {"content": text}
            case CallStart(index, id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return {}

    def _common(self, choice: LiveChoice, delta: Delta) -> Json:
        """Calls have a finish reason of their own, but for the one that the client has named."""
        fields = super()._common(choice, delta)
        if choice.assembler.num_calls and delta.finish_reason == "stop":
            fields["finish_reason"] = "stop" if self._one_tool else "tool_calls"
        return fields

    def _usage(self) -> Json:
        return {
            **super()._usage(),
            **_details(choice.assembler.num_reasoning_tokens for choice in self._call.choices),
        }

    def _running_usage(self, choice: LiveChoice, delta: Delta | None = None) -> Json:
        found = super()._running_usage(choice, delta)
        if found:
            found["usage"] |= _details([choice.assembler.num_reasoning_tokens])
        return found

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> Json | None:
        """Of all tokens of a reply, those of its reasoning, its calls and its markers among
        them."""
        if self._top is None:
            return None
        found = scored(entries, self._tokenizer, self._top, by_id=self._by_id)
        return {"content": encoded_list(found), "refusal": None}


def _details(reasoning_tokens: Iterable[int]) -> Json:
    return {"completion_tokens_details": {"reasoning_tokens": sum(reasoning_tokens)}}
