"""The two endpoints' formats: how choices and their deltas become OpenAI's response types."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from moebius.engine.client import TokenLogprob
from moebius.outputs import Delta
from moebius.server import responses as r
from moebius.server.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from moebius.server.protocol import ChatRequest, CompletionRequest
from moebius.server.stream import Call, Choice
from moebius.text import Tokenizer


class _Format:
    """What both formats share: the call's constants, and usage."""

    def __init__(
        self, call: Call, request: CompletionRequest | ChatRequest, tokenizer: Tokenizer, model: str, fingerprint: str
    ) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._usage_asked = request.include_usage
        self._ids_asked = request.return_token_ids
        self._prompt_logprobs_asked = request.prompt_logprobs
        self._model = model
        self._fingerprint = fingerprint
        self._created = int(time.time())
        self._begun: set[int] = set()

    def _begin(self, choice: Choice) -> bool:
        """Whether this is the first that is sent of a choice."""
        first = choice.index not in self._begun
        self._begun.add(choice.index)
        return first

    def _usage(self) -> r.Usage:
        call = self._call
        total = call.prompt_tokens + call.completion_tokens
        return r.Usage(
            call.prompt_tokens, call.completion_tokens, total, r.PromptTokensDetails(cached_tokens=call.cached_tokens)
        )

    @property
    def _chunk_usage(self) -> r.Usage | UnsetType | None:
        return None if self._usage_asked else UNSET

    def _shows(self, delta: Delta, *, logprobs: bool) -> bool:
        """Whether a delta says anything that the client asked for."""
        return bool(delta.text or delta.finish_reason or (delta.token_ids and (logprobs or self._ids_asked)))

    def _ids(self, token_ids: Sequence[int]) -> tuple[int, ...] | UnsetType:
        return tuple(token_ids) if self._ids_asked else UNSET

    def _prompt_logprobs(self, choice: Choice) -> r.PromptLogprobs | UnsetType:
        if self._prompt_logprobs_asked is None:
            return UNSET
        return prompt_logprobs(self._tokenizer, choice.assembler.prompt_logprobs, self._prompt_logprobs_asked)


class CompletionFormat(_Format):
    """/v1/completions. `texts` are the prompts as the client wrote them, None where they came as token ids."""

    def __init__(
        self,
        call: Call,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        model: str,
        fingerprint: str,
        texts: Sequence[str | None],
    ) -> None:
        super().__init__(call, request, tokenizer, model, fingerprint)
        self._logprobs_asked = request.logprobs
        self._echoed: list[str] | None = None
        if request.echo:
            pairs = zip(texts, call.ask.prompts, strict=True)
            self._echoed = [tokenizer.decode(ids) if text is None else text for text, ids in pairs]

    def chunks(self, batch: Sequence[tuple[Choice, Delta]]) -> list[Struct]:
        found: list[Struct] = []
        for choice, delta in batch:
            if not self._shows(delta, logprobs=self._logprobs_asked is not None):
                continue
            first = self._begin(choice)
            chunk = self._choice(choice, delta, echo=first)
            chunk.prompt_token_ids = self._ids(choice.request.prompt_ids) if first else UNSET
            found.append(self._completion([chunk], self._chunk_usage))
        return found

    def closing(self) -> list[Struct]:
        return [self._completion([], self._usage())] if self._usage_asked else []

    def whole(self) -> Struct:
        choices = []
        for choice in self._call.choices:
            a = choice.assembler
            all_of_it = Delta(
                a.text, tuple(a.token_ids), tuple(a.logprobs), tuple(a.text_offsets), a.finish_reason, a.stop_reason
            )
            found = self._choice(choice, all_of_it, echo=True)
            found.prompt_token_ids = self._ids(choice.request.prompt_ids)
            found.prompt_logprobs = self._prompt_logprobs(choice)
            choices.append(found)
        return self._completion(choices, self._usage())

    def _completion(self, choices: list[r.CompletionChoice], usage: r.Usage | UnsetType | None) -> r.Completion:
        return r.Completion(self._call.id, self._created, self._model, choices, self._fingerprint, usage)

    def _choice(self, choice: Choice, delta: Delta, *, echo: bool) -> r.CompletionChoice:
        prompt = self._echoed[choice.prompt_index] if self._echoed is not None else ""
        return r.CompletionChoice(
            index=choice.index,
            text=prompt + delta.text if echo else delta.text,
            logprobs=self._logprobs(choice, delta, prompt, echo=echo and self._echoed is not None),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason if delta.finish_reason else UNSET,
            token_ids=self._ids(delta.token_ids),
        )

    def _logprobs(self, choice: Choice, delta: Delta, prompt: str, *, echo: bool) -> r.CompletionLogprobs | None:
        k = self._logprobs_asked
        if k is None:
            return None
        offsets = [len(prompt) + offset for offset in delta.text_offsets]
        found = completion_logprobs(self._tokenizer, delta.token_ids, delta.logprobs, offsets, k)
        if not echo:
            return found
        ids = choice.request.prompt_ids
        prompt_offsets = [min(offset, len(prompt)) for offset in self._tokenizer.text_offsets(ids)]
        entries = [None, *choice.assembler.prompt_logprobs]
        head = completion_logprobs(self._tokenizer, ids, entries, prompt_offsets, k)
        return r.CompletionLogprobs(
            head.tokens + found.tokens,
            head.token_logprobs + found.token_logprobs,
            head.top_logprobs + found.top_logprobs,
            head.text_offset + found.text_offset,
        )


class ChatFormat(_Format):
    """/v1/chat/completions."""

    def __init__(self, call: Call, request: ChatRequest, tokenizer: Tokenizer, model: str, fingerprint: str) -> None:
        super().__init__(call, request, tokenizer, model, fingerprint)
        self._top = (request.top_logprobs or 0) if request.logprobs else None

    def chunks(self, batch: Sequence[tuple[Choice, Delta]]) -> list[Struct]:
        found: list[Struct] = []
        for choice, delta in batch:
            if not self._shows(delta, logprobs=self._top is not None):
                continue
            if self._begin(choice):
                role = self._chunk([r.ChatChunkChoice(choice.index, r.ChatDelta("assistant", ""))])
                role.prompt_token_ids = self._ids(choice.request.prompt_ids)
                found.append(role)
            said = r.ChatDelta(content=delta.text) if delta.text else r.ChatDelta()
            chunk = r.ChatChunkChoice(choice.index, said, self._logprobs(delta.logprobs), delta.finish_reason)
            chunk.stop_reason = delta.stop_reason if delta.finish_reason else UNSET
            chunk.token_ids = self._ids(delta.token_ids)
            found.append(self._chunk([chunk]))
        return found

    def closing(self) -> list[Struct]:
        if not self._usage_asked:
            return []
        last = self._chunk([])
        last.usage = self._usage()
        return [last]

    def whole(self) -> Struct:
        choices = []
        for choice in self._call.choices:
            a = choice.assembler
            found = r.ChatChoice(choice.index, r.ChatMessage("assistant", a.text), self._logprobs(a.logprobs))
            found.finish_reason, found.stop_reason = a.finish_reason, a.stop_reason
            found.token_ids = self._ids(a.token_ids)
            choices.append(found)
        first = self._call.choices[0]
        response = r.ChatCompletion(
            self._call.id, self._created, self._model, choices, self._fingerprint, self._usage()
        )
        response.prompt_token_ids = self._ids(first.request.prompt_ids)
        response.prompt_logprobs = self._prompt_logprobs(first)
        return response

    def _chunk(self, choices: list[r.ChatChunkChoice]) -> r.ChatChunk:
        return r.ChatChunk(self._call.id, self._created, self._model, choices, self._fingerprint, self._chunk_usage)

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> r.ChatLogprobs | None:
        return None if self._top is None else chat_logprobs(self._tokenizer, entries, self._top)
