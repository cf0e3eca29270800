"""From an engine's tokens to text, and the token ids and log-probabilities that go with it."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from moebius.engine.client import StepOutput, TokenLogprob
from moebius.errors import EngineError
from moebius.front.constraints import named
from moebius.front.origins import Origins, Place
from moebius.front.reply_feed import Feed, PlainFeed, ReplyFeed
from moebius.front.results import CompletionOutput, EndReason
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.text import IncrementalDecoder, StopMatcher, Tokenizer
from moebius.text.replies import CallStart, Event, ReplyParser, fold, merged

_END_REASONS: dict[FinishReason, EndReason] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.COMPLETE: "stop",
}


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step adds to a choice: text, and the tokens whose text is thereby out (or never is).

    text            as the model wrote it
    logprobs        one for each of token_ids, empty where none were asked for
    text_offsets    where each token's text begins in the choice's whole text, in characters
    finish_reason   set on the last delta of a choice, and on no other
    events          what that makes of a reply to a chat; all of a text that is none is content.
                    They may come later than their text, and their tokens. Where log-probabilities
                    were asked for, content says which tokens it is made of
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    text_offsets: tuple[int, ...] = ()
    finish_reason: EndReason | None = None
    stop_reason: str | int | None = None
    events: tuple[Event, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.events or self.token_ids or self.finish_reason)


@dataclass(slots=True)
class _Held:
    """A token that waits for its text."""

    token_id: int
    logprob: TokenLogprob | None
    place: Place


class SequenceAssembler:
    """Turns one request's StepOutputs into Deltas: decodes, looks for stop strings, reads events,
    keeps text and tokens together.

    A token is released with the last of its text, or after it. When a stop string completes at a
    token, text ends before the string, and token ids, log-probabilities and usage end with that
    token, whatever the engine has drawn meanwhile. No stop string is looked for before the
    min_tokens-th token, and all are looked for in the text as the model wrote it. The text of the
    token that made the engine stop is left out. A stop string may name special tokens, which it
    meets whether or not the text leaves them out.

    With `prompt_ids` the text continues the prompt's (completions: a leading space stays); without
    it stands alone. reply: tells what a chat's reply is made of; without, all of it is content.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int] = (),
        reply: ReplyParser | None = None,
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, prompt_ids, params.skip_special_tokens)
        self._matcher = StopMatcher(
            params.stop, tokenizer.split_special, keep=params.include_stop_str_in_output
        )
        self._params = params
        self._tokenizer = tokenizer
        origins = None if params.logprobs is None else Origins()
        self._feed: Feed = PlainFeed(origins) if reply is None else ReplyFeed(reply, origins)
        self._held: deque[_Held] = deque()
        self._decoded = 0
        self._released = 0
        self._events: list[Event] = []
        self._deltas: list[Delta] = []
        self.output_ids: list[int] = []
        """Tokens drawn so far; after a stop string none beyond the one that completed it."""
        self.output_logprobs: list[TokenLogprob] = []
        """One for each of output_ids, empty where none were asked for."""
        self.prompt_logprobs: list[TokenLogprob] = []
        self.num_cached_tokens = 0
        self.num_calls = 0
        """Tool calls that the reply has begun."""
        self.finish_reason: EndReason | None = None
        self.stop_reason: str | int | None = None
        self.wants_abort = False

    @property
    def num_tokens(self) -> int:
        """Tokens drawn so far, for usage."""
        return len(self.output_ids)

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of them that are reasoning, for usage."""
        return self._feed.reasoning_tokens

    @property
    def malformed_calls(self) -> int:
        """Tool calls that did not parse."""
        return self._feed.malformed

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
            texts.append(self._read(self._take(token_id, logprob, ender)))
            if self.finished:
                self.wants_abort = step.finish_reason is None
                return self._delta("".join(texts))
        if step.finish_reason is not None:
            if step.finish_reason not in _END_REASONS:
                early = EngineError(f"the request ended early: {step.finish_reason.value}")
                raise named(step.error or early, self._params)
            texts.append(self._read(self._finish(_END_REASONS[step.finish_reason])))
        return self._delta("".join(texts))

    def _read(self, text: str) -> str:
        """Make events of text that is released now, and give it back."""
        self._events += self._feed.feed(text)
        if self._feed.done and not self.finished:
            self.finish_reason = "stop"
        if self.finished:
            self._events += self._feed.finish(cut=self.finish_reason == "length")
        return text

    def _take(self, token_id: int, logprob: TokenLogprob | None, ender: bool) -> str:
        """One more token; the text that it releases."""
        index = len(self.output_ids)
        self.output_ids.append(token_id)
        if logprob is not None:
            self.output_logprobs.append(logprob)
        special = token_id in self._tokenizer.special_ids
        symbol = self._feed.symbols.get(token_id, "")
        text = ""
        if symbol:
            # A character that is unfinished before a control token stays so.
            text = self._decoder.flush()
            self._decoded += len(text)
            self._settle(text)
        place = Place(index, self._decoded, symbol=symbol)
        self._held.append(_Held(token_id, logprob, place))
        asked = ender and token_id in self._params.stop_token_ids
        if ender:
            self.stop_reason = token_id if asked else None
        silent = ender and not (asked and self._params.include_stop_str_in_output)
        if symbol or not silent:
            self._feed.expect(place)
        if silent:
            place.end = self._decoded
            return self._match(text) + (self._match_special(token_id) if special else "")
        own = self._decoder.push(token_id)
        self._decoded += len(own)
        self._settle(own, place)
        released = self._match(text + own)
        if special and self._params.skip_special_tokens and not self.finished:
            released += self._match_special(token_id)
        return released

    def _settle(self, text: str, newest: Place | None = None) -> None:
        """Set the end of each token whose bytes have become characters: of any text the first
        character is of all bytes held before it."""
        for held in reversed(self._held):
            if held.place is newest:
                held.place.end = None if self._decoder.num_pending else self._decoded
            elif held.place.end is not None or not text:
                break
            else:
                held.place.end = self._decoded - len(text) + 1

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
            self.finish_reason = "stop"
            self.stop_reason = stop
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
        while self._held and (self.finished or self._held[0].place.is_out(self._released)):
            out.append(self._held.popleft())
        events = tuple(merged(self._events))
        self.num_calls += sum(isinstance(event, CallStart) for event in events)
        delta = Delta(
            text=text,
            events=events,
            token_ids=tuple(held.token_id for held in out),
            logprobs=tuple(held.logprob for held in out if held.logprob is not None),
            text_offsets=tuple(min(held.place.start, self._released) for held in out),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._events = []
        self._deltas.append(delta)
        return delta

    @property
    def released(self) -> Delta:
        """All that was released so far, as one delta."""
        deltas = self._deltas
        return Delta(
            text="".join(delta.text for delta in deltas),
            events=tuple(chain.from_iterable(delta.events for delta in deltas)),
            token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
            logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
            text_offsets=tuple(chain.from_iterable(delta.text_offsets for delta in deltas)),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def completion(self, index: int = 0) -> CompletionOutput:
        """The choice as released so far."""
        released = self.released
        said = fold(released.events)
        return CompletionOutput(
            index=index,
            text=said.content or "",
            reasoning=said.reasoning,
            tool_calls=said.calls,
            token_ids=released.token_ids,
            logprobs=None if self._params.logprobs is None else released.logprobs,
            finish_reason=released.finish_reason,
            stop_reason=released.stop_reason,
        )
