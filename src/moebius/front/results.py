"""What a front door hands out: the choices of a prompt, with the token ids behind their text."""

from dataclasses import dataclass
from typing import Literal

from moebius.engine.client import TokenLogprob
from moebius.text.replies import SaidCall

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice.

    text            without the stop string or stop token that ended it, and without special tokens;
                    of a chat's reply the content alone
    token_ids       all drawn tokens, the end token or the one that completed a stop string included
    logprobs        one for each of token_ids; None where none were asked for
    finish_reason   None while it is unfinished
    stop_reason     the stop string or the id of stop_token_ids that ended it; None for an
                    end-of-sequence token that no stop string names
    reasoning       what the model thought before it answered a chat; None for none
    tool_calls      those that the reply to a chat makes
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: EndReason | None = None
    stop_reason: str | int | None = None
    reasoning: str | None = None
    tool_calls: tuple[SaidCall, ...] = ()


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
