"""A step as plain data: printable, replayable, and never changed once made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

WaitReason = Literal["no_budget", "no_blocks", "no_seats", "prefix_in_flight"]
"""Why a request has no chunk in a plan, and so what wakes it: the next step's budget, a block or a seat given back, or
the running request that is computing its prefix."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions start to start + num_tokens - 1 of one request, to be computed in this step.

    samples            the logits of the last position are wanted, to draw the next token
    block_ids          the blocks of positions 0 to start + num_tokens - 1, in order
    num_cached_tokens  tokens that came from the prefix cache when the request first ran
    """

    request_id: str
    start: int
    num_tokens: int
    samples: bool
    block_ids: tuple[int, ...]
    num_cached_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute, in the order of service.

    preempted  lost their blocks in favour of earlier ones; they wait again, and will recompute
    expired    their deadline passed: already finished, with FinishReason.DEADLINE
    waiting    request id -> reason, for all other unfinished requests without a chunk
    """

    step: int
    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...]
    expired: tuple[str, ...]
    waiting: Mapping[str, WaitReason]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)
