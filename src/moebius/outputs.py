"""From an engine's tokens to what a front door hands out: text, and the token ids and
log-probabilities behind it."""

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from moebius.engine.client import EngineInfo, StepOutput, TokenLogprob
from moebius.errors import EngineError
from moebius.schedule.request import FinishReason, Request, SamplingParams, choice_seed
from moebius.text import IncrementalDecoder, StopMatcher, Tokenizer

EndReason = Literal["stop", "length"]
_END_REASONS: dict[FinishReason, EndReason] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice.

    text            without the stop string or stop token that ended it, and without special tokens
    token_ids       all drawn tokens, the end token or the one that completed a stop string included
    logprobs        one for each of token_ids; None where none were asked for
    finish_reason   None while it is unfinished
    stop_reason     the stop string or the id of stop_token_ids that ended it; None for an
                    end-of-sequence token that no stop string names
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: EndReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its choices.

    prompt               the prompt's text, None where it came as token ids
    prompt_logprobs      one for each prompt token, None for the first; None where none were asked
                         for
    num_cached_tokens    prompt tokens that came from the prefix cache
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int = 0
    finished: bool = True

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def completion_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to a choice: text, and the tokens whose text is thereby out (or never will
    be).

    logprobs        one for each of token_ids, empty where none were asked for
    text_offsets    where each token's text begins in the choice's whole text, in characters
    finish_reason   set on the last delta of a choice, and on no other
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    text_offsets: tuple[int, ...] = ()
    finish_reason: EndReason | None = None
    stop_reason: str | int | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids or self.finish_reason)


@dataclass(slots=True)
class _Held:
    """A token that waits for its text, which begins at character `start` and is out once `end`
    characters are.

    `end` is None while the token's last bytes are part of an unfinished character.
    """

    token_id: int
    logprob: TokenLogprob | None
    start: int
    end: int | None = None


class SequenceAssembler:
    """Turns one request's StepOutputs into Deltas: decodes, looks for stop strings, keeps text and
    tokens together.

    A token is released with the last of its text, or after it. When a stop string completes at a
    token, text ends before the string, and token ids, log-probabilities and usage end with that
    token, whatever the engine has drawn meanwhile. No stop string is looked for before the
    min_tokens-th token. The text of the token that made the engine stop is left out. A stop string
    may name special tokens, which it meets whether or not the text leaves them out.

    With `prompt_ids` the text continues the prompt's (completions: a leading space stays); without
    it stands alone.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, *, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, prompt_ids, params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop, tokenizer.split_special)
        self._params = params
        self._tokenizer = tokenizer
        self._held: deque[_Held] = deque()
        self._decoded = self._released = 0
        self._deltas: list[Delta] = []
        self.num_tokens = 0
        """Tokens drawn so far, for usage; after a stop string none beyond the one that completed
        it."""
        self.prompt_logprobs: list[TokenLogprob] = []
        self.num_cached_tokens = 0
        self.finish_reason: EndReason | None = None
        self.stop_reason: str | int | None = None
        self.wants_abort = False

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, step: StepOutput) -> Delta:
        """Take one step's output. Anything after the end is dropped.

        Raises the step's error (EngineError where it has none) if the engine ended the request with
        anything but STOP or LENGTH before this assembler did.
        """
        if self.finished:
            return Delta()
        self.num_cached_tokens = max(self.num_cached_tokens, step.num_cached_tokens)
        self.prompt_logprobs.extend(step.prompt_logprobs)
        texts: list[str] = []
        ends = step.finish_reason is FinishReason.STOP
        for i, token_id in enumerate(step.token_ids):
            logprob = step.logprobs[i] if step.logprobs else None
            ender = ends and i == len(step.token_ids) - 1
            texts.append(self._take(token_id, logprob, ender))
            if self.finished:
                self.wants_abort = step.finish_reason is None
                return self._delta("".join(texts))
        if step.finish_reason is not None:
            if step.finish_reason not in _END_REASONS:
                raise step.error or EngineError(
                    f"the request ended early: {step.finish_reason.value}"
                )
            texts.append(self._finish(_END_REASONS[step.finish_reason]))
        return self._delta("".join(texts))

    def _take(self, token_id: int, logprob: TokenLogprob | None, ender: bool) -> str:
        """One more token; the text that it releases."""
        self.num_tokens += 1
        held = _Held(token_id, logprob, self._decoded)
        self._held.append(held)
        special = token_id in self._tokenizer.special_ids
        if ender:
            self.stop_reason = token_id if token_id in self._params.stop_token_ids else None
            return self._match_special(token_id) if special else ""
        text = self._decoder.push(token_id)
        self._decoded += len(text)
        self._settle(text, held)
        hidden = special and self._params.skip_special_tokens
        return self._match_special(token_id) if hidden else self._match(text)

    def _settle(self, text: str, newest: _Held) -> None:
        """Set the end of each token whose bytes have become characters: any text settles all bytes
        held before it."""
        for held in reversed(self._held):
            if held is newest:
                held.end = None if self._decoder.num_pending else self._decoded
            elif held.end is not None or not text:
                break
            else:
                held.end = self._decoded

    def _match(self, text: str) -> str:
        if self.num_tokens < self._params.min_tokens:
            return text
        return self._after(*self._matcher.push(text))

    def _match_special(self, token_id: int) -> str:
        if self.num_tokens < self._params.min_tokens:
            return ""
        released = self._after(*self._matcher.push_special(self._tokenizer.special_text(token_id)))
        return released + self._decoder.flush() if self.finished else released

    def _after(self, released: str, stop: str | None) -> str:
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        return released

    def _finish(self, reason: EndReason) -> str:
        """The engine is done: release all that was held back."""
        text = self._decoder.flush()
        self._decoded += len(text)
        released = self._match(text)
        if self.finish_reason is None:
            released += self._matcher.flush()
            self.finish_reason = reason
        return released

    def _delta(self, text: str) -> Delta:
        """Record the text and release the tokens that go with it."""
        self._released += len(text)
        out: list[_Held] = []
        while self._held and (
            self.finished or (self._held[0].end is not None and self._held[0].end <= self._released)
        ):
            out.append(self._held.popleft())
        delta = Delta(
            text,
            tuple(held.token_id for held in out),
            tuple(held.logprob for held in out if held.logprob is not None),
            tuple(min(held.start, self._released) for held in out),
            self.finish_reason,
            self.stop_reason,
        )
        self._deltas.append(delta)
        return delta

    @property
    def released(self) -> Delta:
        """All that was released so far, as one delta."""
        text = "".join(delta.text for delta in self._deltas)
        ids, logprobs, offsets = (
            tuple(chain.from_iterable(getattr(delta, name) for delta in self._deltas))
            for name in ("token_ids", "logprobs", "text_offsets")
        )
        return Delta(text, ids, logprobs, offsets, self.finish_reason, self.stop_reason)

    def completion(self, index: int = 0) -> CompletionOutput:
        """The choice as released so far."""
        d = self.released
        logprobs = None if self._params.logprobs is None else d.logprobs
        return CompletionOutput(
            index, d.text, d.token_ids, logprobs, d.finish_reason, d.stop_reason
        )


def open_choices(
    tokenizer: Tokenizer,
    info: EngineInfo,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    ids: Iterator[str],
    *,
    continues: bool,
    **request: Any,
) -> Iterator[tuple[Request, SequenceAssembler]]:
    """The `params.n` choices of one prompt: each one's request, checked, and what its StepOutputs
    go to.

    The prompt is checked once, and all choices share it. `ids` names the requests, `request` holds
    further arguments of Request.create, which raises RequestError. A seed that is given serves
    every prompt alike, so that an answer does not depend on the prompt's place in a call; where
    none is given each prompt draws its own. `continues`: the text continues the prompt's.
    """
    seed = secrets.randbits(64) if params.seed is None else params.seed
    first = Request.create(
        next(ids),
        prompt_ids,
        params,
        info.limits,
        eos_ids=info.eos_ids,
        seed=choice_seed(seed, 0),
        **request,
    )
    others = (first.sibling(next(ids), choice_seed(seed, i)) for i in range(1, params.n))
    for made in chain((first,), others):
        yield (
            made,
            SequenceAssembler(tokenizer, params, prompt_ids=made.prompt_ids if continues else ()),
        )
