"""What clients are told of their requests, and what it takes to tell no one anything twice."""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from moebius.engine.client import StepOutput, TokenLogprob
from moebius.engine.counters import Counters
from moebius.engine.sampler import Sampled
from moebius.errors import MoebiusError
from moebius.request.finish import FinishReason
from moebius.schedule.request import Request


@dataclass(slots=True)
class _Told:
    """A request whose last output is still to be made; the scheduler forgets it before.

    num_scored  how many prompt tokens' log-probabilities were sent, by whichever engine
    num_cached  how many prompt tokens came from the prefix cache
    counted     whether the counters know its prompt: from its first token on, or from its end
    """

    request: Request
    num_scored: int = 0
    num_cached: int = 0
    counted: bool = False


class Outputs:
    """Makes StepOutputs; keeps each request from `add` to its last output."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._told: dict[str, _Told] = {}

    def __len__(self) -> int:
        """How many requests are without their last output."""
        return len(self._told)

    def add(self, request: Request) -> None:
        # An engine that has drawn tokens has scored the whole prompt before.
        scored = len(request.prompt_ids) - 1 if request.output_ids else 0
        self._told[request.id] = _Told(request, scored)

    def unsent(
        self, request: Request, start: int, scored: list[TokenLogprob]
    ) -> list[TokenLogprob]:
        """Of a prompt's scores from position `start` on those not sent before a preemption."""
        told = self._told[request.id]
        sent = told.num_scored
        told.num_scored = max(sent, start + len(scored) - 1)
        return scored[max(sent + 1 - start, 0) :]

    def news(
        self,
        request: Request,
        drawn: Sequence[Sampled],
        scored: Sequence[TokenLogprob],
        now: float,
    ) -> StepOutput:
        """What a step brought: tokens and their log-probabilities, scores, the end."""
        told = self._told[request.id]
        if not told.counted and (drawn or request.finished):
            told.counted = True
            prompt = len(request.asked.prompt_ids)
            # What an earlier engine has drawn may have been found, too.
            told.num_cached = min(request.num_cached_tokens or 0, prompt)
            self._counters.prompt(prompt, told.num_cached)
        if request.finished:
            del self._told[request.id]
        return StepOutput(
            request_id=request.id,
            token_ids=tuple(each.token_id for each in drawn),
            logprobs=tuple(each.logprob for each in drawn if each.logprob),
            prompt_logprobs=tuple(scored),
            finish_reason=request.finish_reason,
            num_cached_tokens=told.num_cached,
            at=now,
            scheduled=request.scheduled,
            num_preemptions=request.num_preemptions,
        )

    def last(
        self, request_id: str, reason: FinishReason, error: MoebiusError, now: float
    ) -> StepOutput:
        """That a request ended with an error, be it still known or not."""
        ended = StepOutput(request_id, finish_reason=reason, error=error, at=now)
        told = self._told.pop(request_id, None)
        if told is None:
            return ended
        request = told.request
        return replace(ended, scheduled=request.scheduled, num_preemptions=request.num_preemptions)
