"""Endpoints' formats: how choices, their deltas and their log-probabilities become OpenAI's JSON.

What may be long is encoded in pieces: one call of the encoder holds the interpreter's lock from its
begin to its end.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import msgspec

from moebius.engine.client import TokenLogprob
from moebius.front.assemble import Delta
from moebius.server.protocol import CompletionRequest, GenerationRequest
from moebius.server.stream import Call, LiveChoice, News
from moebius.text import Tokenizer, text_offsets

Json = dict[str, Any]
# JSON has no -inf; this is what OpenAI sends for it.
FLOOR = -9999.0
_PIECE = 256


def encoded_list(items: Iterable[object]) -> msgspec.Raw:
    """A list as JSON, made of pieces of some hundred items."""
    rest = iter(items)
    pieces: list[bytes] = []
    while piece := list(islice(rest, _PIECE)):
        pieces.append(msgspec.json.encode(piece)[1:-1])
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")


def legacy_token(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; OpenAI's `bytes:\\xNN` form where its bytes alone are no characters, so that
    two such differ."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def scored(
    entries: Iterable[TokenLogprob], tokenizer: Tokenizer, top: int, *, by_id: bool = False
) -> Iterator[Json]:
    """Tokens as OpenAI's chats and responses have them: text, bytes, log-probability, and the same
    of the `top` most likely ones. by_id: the text is token_id:5 of token 5."""

    def one(token_id: int, logprob: float) -> Json:
        raw = tokenizer.token_bytes(token_id)
        return {
            "token": f"token_id:{token_id}" if by_id else raw.decode("utf-8", "replace"),
            "logprob": max(logprob, FLOOR),
            "bytes": list(raw),
        }

    for entry in entries:
        likely = [one(*pair) for pair in entry.top[:top]]
        yield {**one(entry.token_id, entry.logprob), "top_logprobs": likely}


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Format:
    """One endpoint's format for one call: what both endpoints do alike."""

    kind: ClassVar[str]
    """What `object` says of a whole response."""
    chunk_kind: ClassVar[str]

    def __init__(
        self,
        call: Call,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        model: str,
        fingerprint: str,
    ) -> None:
        self._call = call
        self._request = request
        self._tokenizer = tokenizer
        self._top = call.params.logprobs
        self._by_id = request.return_tokens_as_token_ids
        self.id = (
            call.id if request.request_id is None else f"{request.id_prefix}-{request.request_id}"
        )
        self._head = {
            "id": self.id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._begun: set[int] = set()
        self._sent: Counter[int] = Counter()
        """How many tokens a stream has sent of each choice."""
        self._prepare()

    def _prepare(self) -> None:
        """What an endpoint's own format makes of the request before anything is answered."""

    def chunks(self, news: News) -> list[Json]:
        """What a stream sends: of the news, whatever says something that the client asked for."""
        found: list[Json] = []
        for choice, delta in news:
            tokens_asked = self._top is not None or self._request.return_token_ids
            said = self._says(delta) or delta.finish_reason
            if said or (delta.token_ids and tokens_asked):
                found += self._chunks(choice, delta, first=choice.index not in self._begun)
                self._begun.add(choice.index)
        return found

    def _says(self, delta: Delta) -> bool:
        """Whether there is something in it for every client."""
        return bool(delta.text)

    def closing(self) -> list[Json]:
        """What a stream sends when all choices are finished, before [DONE]."""
        return [self._chunk(usage=self._usage())] if self._request.include_usage else []

    def whole(self) -> Iterator[bytes]:
        """The response that is not streamed, once all choices are finished, in pieces."""
        head = {**self._head, "object": self.kind, "usage": self._usage(), **self._beside()}
        yield msgspec.json.encode(head)[:-1] + b',"choices":['
        for i, choice in enumerate(self._call.choices):
            yield b"," * (i > 0) + msgspec.json.encode(
                self._choice(choice, choice.assembler.released)
            )
        yield b"]}"

    def _beside(self) -> Json:
        """What stands beside the choices."""
        return {}

    def _choice(self, choice: LiveChoice, said: Delta) -> Json:
        raise NotImplementedError

    def _chunks(self, choice: LiveChoice, delta: Delta, *, first: bool) -> Iterable[Json]:
        raise NotImplementedError

    def _chunk(self, *choices: Json, **fields: Any) -> Json:
        usage = {"usage": None} if self._request.include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": choices, **usage, **fields}

    def _running_usage(self, choice: LiveChoice, delta: Delta | None = None) -> Json:
        """The choice's own, with what `delta` adds to it; where the client wants it in each
        chunk."""
        self._sent[choice.index] += 0 if delta is None else len(delta.token_ids)
        if not self._request.continuous_usage:
            return {}
        cached = choice.assembler.num_cached_tokens
        return {"usage": usage_of(len(choice.request.prompt_ids), self._sent[choice.index], cached)}

    def _common(self, choice: LiveChoice, delta: Delta) -> Json:
        """The fields of every kind of choice."""
        stop = {"stop_reason": delta.stop_reason} if delta.finish_reason else {}
        ids = self._ids("token_ids", delta.token_ids)
        return {"index": choice.index, "finish_reason": delta.finish_reason, **stop, **ids}

    def _usage(self) -> Json:
        """Each prompt counted once, however many choices; completions summed."""
        call = self._call
        return usage_of(call.prompt_tokens, call.completion_tokens, call.cached_tokens)

    def _ids(self, field: str, token_ids: Sequence[int]) -> Json:
        return {field: tuple(token_ids)} if self._request.return_token_ids else {}

    def _prompt_logprobs(self, choice: LiveChoice) -> Json:
        """vLLM's field: null where not asked for; else a list: null for the first token, then id ->
        logprob, rank and text, the prompt's own included."""
        k = self._request.prompt_logprobs
        return {"prompt_logprobs": None if k is None else encoded_list(self._scored(choice, k))}

    def _scored(self, choice: LiveChoice, k: int) -> Iterator[dict[str, Json] | None]:
        text = self._tokenizer.token_text
        yield None
        for entry in choice.assembler.prompt_logprobs:
            ranked = [
                (token_id, logprob, rank)
                for rank, (token_id, logprob) in enumerate(entry.top[:k], 1)
            ]
            if all(token_id != entry.token_id for token_id, _, _ in ranked):
                ranked.insert(0, (entry.token_id, entry.logprob, entry.rank))
            yield {
                str(id): {"logprob": max(logprob, FLOOR), "rank": rank, "decoded_token": text(id)}
                for id, logprob, rank in ranked
            }


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt that is sent back: its text, and where in it each of its tokens begins if that is
    asked for."""

    text: str = ""
    offsets: Sequence[int] = ()


class CompletionFormat(Format):
    """/v1/completions."""

    kind = chunk_kind = "text_completion"
    _request: CompletionRequest

    def _prepare(self) -> None:
        # Here and not later, for a long prompt is handled on a thread of its own, and answered on
        # the event loop.
        prompts: Sequence[str | Sequence[int]] = self._request.prompt
        if self._request.truncate_prompt_tokens is not None:  # what was cut off is no prompt
            prompts = [
                choice.request.prompt_ids for choice in self._call.choices[:: self._call.params.n]
            ]
        self._echoed = [self._echo(prompt) for prompt in prompts]

    def _echo(self, prompt: str | Sequence[int]) -> _Echo:
        """What goes before a prompt's choices: its text as it came, or decoded, where it is to be
        echoed."""
        if not self._request.echo:
            return _Echo()
        scored = self._top is not None
        skip = self._call.params.skip_special_tokens
        if isinstance(prompt, str):
            special = self._request.add_special_tokens
            return _Echo(prompt, self._tokenizer.offsets(prompt, special) if scored else ())
        offsets = text_offsets(self._tokenizer, prompt, skip) if scored else ()
        return _Echo(self._tokenizer.decode(prompt, skip), offsets)

    def _choice(self, choice: LiveChoice, said: Delta) -> Json:
        return {**self._piece(choice, said, first=True), **self._prompt_logprobs(choice)}

    def _chunks(self, choice: LiveChoice, delta: Delta, *, first: bool) -> Iterable[Json]:
        yield self._chunk(
            self._piece(choice, delta, first=first), **self._running_usage(choice, delta)
        )

    def _piece(self, choice: LiveChoice, delta: Delta, *, first: bool) -> Json:
        prompt = self._echoed[choice.prompt_index]
        return {
            "text": prompt.text + delta.text if first else delta.text,
            "logprobs": self._logprobs(choice, delta, prompt, echo=first and self._request.echo),
            **(self._ids("prompt_token_ids", choice.request.prompt_ids) if first else {}),
            **self._common(choice, delta),
        }

    def _logprobs(
        self, choice: LiveChoice, delta: Delta, prompt: _Echo, *, echo: bool
    ) -> Json | None:
        """The k most likely tokens of each position, and the chosen one besides; a prompt's first
        token has none."""
        if self._top is None:
            return None
        ids: list[int] = list(delta.token_ids)
        entries: list[TokenLogprob | None] = list(delta.logprobs)
        offsets = [len(prompt.text) + offset for offset in delta.text_offsets]
        if echo:
            ids = [*choice.request.prompt_ids, *ids]
            entries = [None, *choice.assembler.prompt_logprobs, *entries]
            offsets = [*prompt.offsets, *offsets]
        tokens = [self._named(token_id) for token_id in ids]
        chosen = [None if entry is None else max(entry.logprob, FLOOR) for entry in entries]
        tops = encoded_list(map(self._likely, entries))
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _likely(self, entry: TokenLogprob | None) -> dict[str, float] | None:
        if entry is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top[: self._top], (entry.token_id, entry.logprob)):
            top.setdefault(self._named(token_id), max(logprob, FLOOR))
        return top

    def _named(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._by_id else legacy_token(self._tokenizer, token_id)
