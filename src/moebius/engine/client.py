"""EngineClient: what a front door may ask of an engine, wherever that engine runs.

Across this boundary go token ids, sampling parameters, cache salt and deadline (a `Request`); back come token ids and
log-probabilities (`StepOutput`). Text never crosses it. Nothing here imports torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moebius.errors import MoebiusError
from moebius.schedule.request import FinishReason, Request, ServingLimits


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One position's log-probabilities (natural log, of the model's own softmax).

    rank is the token's place among all of the vocabulary, 1 for the most likely. top holds the k most likely
    (token id, log-probability) pairs, most likely first, ties to the lowest id; the token itself need not be in it.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class StepOutput(NamedTuple):
    """What one step brought one request. The one with a `finish_reason` is the last of its request.

    token_ids        drawn in this step, in order
    logprobs         one for each of token_ids, where the request asked for them
    prompt_logprobs  of prompt positions computed in this step, in order; position 0 has none, so the first is of
                     position 1
    num_cached_tokens   prompt tokens that came from the prefix cache
    error            why it ended, for every finish reason but STOP and LENGTH
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: MoebiusError | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of a loaded engine that never change. fingerprint names weights, configuration and kernels."""

    limits: ServingLimits
    eos_ids: frozenset[int]
    block_size: int
    num_blocks: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's gauges and counters. Counters only grow; tokens and requests are counts.

    last_step and now are on the engine's monotonic clock, in seconds.
    """

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    steps: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    last_step: float = 0.0
    now: float = 0.0
    ready: bool = False

    @property
    def kv_cache_usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return self.used_blocks / max(self.total_blocks, 1)


class EngineClient(Protocol):
    """An engine, in this process or elsewhere. All methods are safe to call from any thread and never block long."""

    @property
    def info(self) -> EngineInfo: ...

    def start(self, deliver: Callable[[list[StepOutput]], None]) -> None:
        """Start the engine, once; `deliver` is called from its thread, once a step, with that step's outputs.

        Outputs that `deliver` raises over are lost, so their requests end with EngineError. Raises EngineError for a
        second start, and once the engine has stopped.
        """

    def submit(self, request: Request) -> None:
        """Hand over a request. Every outcome, refusals too, arrives as a StepOutput with a finish reason.

        Raises EngineError once the engine has stopped, RequestError for the id of an unfinished request.
        """

    def abort(self, request_id: str) -> None:
        """End a request between two steps; unknown or finished ids are no error. Its last StepOutput says ABORT."""

    def stats(self) -> EngineStats: ...

    def close(self, timeout: float) -> None:
        """Stop the engine within `timeout` seconds; what is unfinished ends with EngineError."""
