"""Request: one sequence on its way through an engine, what was asked of it and how far it has come.

n = 3 is three of them. It is built from `prompt_ids` and `output_ids` (not empty after a preemption
or on a replay): positions, penalties, min and max tokens are pure functions of these two lists.
"""

import enum
from array import array
from dataclasses import dataclass, field

from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.schedule.groups import Lineage
from moebius.schedule.states import OwnedStates


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the scheduler: what is `asked`, and how far it has come.

    start_ids           what a decoder beside an encoder begins with, behind the prompt
    source              how many tokens an encoder reads, all in one step: the prompt's, if any
    id to max_tokens    those of `asked`: each step reads them
    output_ids          token ids drawn so far, by whichever engine
    num_computed_tokens how many leading tokens are in the cache, with those of this step's plan
    num_cached_tokens   how many of these came from the prefix cache when it was first scheduled
    scheduled           when that was, on the same clock as arrival; a preemption does not change it
    tables              its block tables, one a group of layers, in order of position; replaced,
                        never changed: a plan holds them without a copy
    num_passed          how many leading entries of each table its window has left behind
    states              its slots for recurrent states, while it runs
    lineage             what its blocks derive from
    block_hashes        prefix hashes of its leading full blocks, computed once
    num_published_blocks  how many leading blocks were offered to the prefix cache, or came from it
    num_awaited_blocks  while it waits: how many leading blocks the cache had when last looked at
    publishes           False once a block it reads was withdrawn: all that it computes is suspect
    """

    asked: EngineRequest
    start_ids: tuple[int, ...] = ()
    source: int = field(init=False)
    id: str = field(init=False)
    prompt_ids: tuple[int, ...] = field(init=False)
    params: SamplingParams = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    max_tokens: int = field(init=False)
    output_ids: list[int] = field(init=False)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    scheduled: float | None = None
    num_preemptions: int = 0
    tables: "tuple[array[int], ...]" = ()
    num_passed: list[int] = field(default_factory=list)
    states: OwnedStates | None = None
    lineage: Lineage | None = None
    block_hashes: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    num_awaited_blocks: int = 0
    publishes: bool = True

    def __post_init__(self) -> None:
        self.id = self.asked.id
        self.source = len(self.asked.prompt_ids) if self.start_ids else 0
        self.prompt_ids = self.asked.prompt_ids + self.start_ids
        self.params = self.asked.params
        self.stop_ids = self.asked.stop_ids
        self.max_tokens = self.asked.max_tokens
        self.output_ids = list(self.asked.output_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def order(self) -> tuple[int, float, str]:
        """As EngineRequest.order."""
        return self.asked.order

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions start to stop - 1 of prompt and output together."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : stop - split]
        return [
            *self.prompt_ids[start : min(stop, split)],
            *self.output_ids[: max(stop - split, 0)],
        ]
