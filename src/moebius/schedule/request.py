"""Request: one sequence on its way through an engine, what was asked of it and how far it has come.

n = 3 is three of them. It is built from `prompt_ids` and `output_ids` (not empty after a preemption
or on a replay): positions, penalties, min and max tokens are pure functions of these two lists.
"""

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from moebius.schedule.engine_request import EngineRequest
from moebius.schedule.groups import Lineage
from moebius.schedule.hashes import PromptHashes
from moebius.schedule.params import SamplingParams, ServingLimits
from moebius.schedule.states import OwnedStates


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a sequence ended. The first two are OpenAI's; the others reach clients as errors."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the scheduler: what is asked, and how far it has come.

    prompt_ids          token ids of the prompt
    output_ids          token ids drawn so far
    stop_ids            token ids that end it (end-of-sequence and stop_token_ids)
    max_tokens          resolved: most tokens to draw
    arrival, deadline   seconds on the engine's monotonic clock
    salt                separates the prefix caches of tenants
    generation_start    how many leading tokens of the prompt come before the generation prompt, the
                        part that a chat template adds for the answer; None where that is not known
    num_computed_tokens how many leading tokens have their keys and values in the cache (or in this
    step's plan)
    num_cached_tokens   how many of these came from the prefix cache when it was first scheduled
    scheduled           when that was, on the same clock as arrival; a preemption does not change it
    tables              its block tables, one a group of layers, in order of position; replaced,
                        never changed: a plan holds them without a copy
    num_passed          how many leading entries of each table its window has left behind
    states              its slots for recurrent states, while it runs
    request_slot        its place for what is written once a request, while it runs
    lineage             what its blocks derive from
    block_hashes        prefix hashes of its leading full blocks, computed once
    prompt_hashes       those of the prompt, where the front has made them
    num_published_blocks  how many leading blocks were offered to the prefix cache, or came from it
    num_awaited_blocks  while it waits: how many leading blocks were in the cache when last looked
                        at
    publishes           False once a block it reads was withdrawn: what it computes from then on is
                        suspect
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int
    arrival: float
    priority: int = 0
    deadline: float | None = None
    salt: bytes = b""
    generation_start: int | None = None
    output_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    scheduled: float | None = None
    num_preemptions: int = 0
    tables: "tuple[array[int], ...]" = ()
    num_passed: list[int] = field(default_factory=list)
    states: OwnedStates | None = None
    request_slot: int | None = None
    lineage: Lineage | None = None
    block_hashes: list[bytes] = field(default_factory=list)
    prompt_hashes: PromptHashes | None = None
    num_published_blocks: int = 0
    num_awaited_blocks: int = 0
    publishes: bool = True

    @classmethod
    def of(cls, asked: EngineRequest) -> Self:
        """What an engine keeps of what it was asked, nothing of it computed yet."""
        return cls(
            id=asked.id,
            prompt_ids=asked.prompt_ids,
            params=asked.params,
            seed=asked.seed,
            stop_ids=asked.stop_ids,
            max_tokens=asked.max_tokens,
            arrival=asked.arrival,
            priority=asked.priority,
            deadline=asked.deadline,
            salt=asked.salt,
            generation_start=asked.generation_start,
            output_ids=list(asked.output_ids),
            prompt_hashes=asked.prompt_hashes,
        )

    @classmethod
    def create(
        cls,
        id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        limits: ServingLimits,
        *,
        arrival: float,
        **fields: Any,
    ) -> Self:
        """`EngineRequest.create`, for who feeds a scheduler or an engine without a front."""
        asked = EngineRequest.create(id, prompt_ids, params, limits, arrival=arrival, **fields)
        return cls.of(asked)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def order(self) -> tuple[int, float, str]:
        """Lower is served first; the last in it is preempted first."""
        return (self.priority, self.arrival, self.id)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions start to stop - 1 of prompt and output together."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : stop - split]
        return [
            *self.prompt_ids[start : min(stop, split)],
            *self.output_ids[: max(stop - split, 0)],
        ]
