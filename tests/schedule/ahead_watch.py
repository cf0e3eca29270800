"""An engine whose steps begin before the host has read the tokens of the ones before, as
engine/steps_ahead.py has it; without tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NoReturn

from moebius.schedule.request import Request
from moebius.schedule.scheduler import Chunk, Scheduler, StepPlan


@dataclass(frozen=True, slots=True)
class _Known:
    """What was computed of a request, up to `end` tokens."""

    request: Request
    preemptions: int
    end: int

    @property
    def stands(self) -> bool:
        return not self.request.finished and self.request.num_preemptions == self.preemptions


class AheadWatch:
    """Remembers what was computed ahead of plans, and that they want just that."""

    def __init__(self, scheduler: Scheduler, broken: Callable[[str, str], NoReturn]) -> None:
        self._scheduler = scheduler
        self._broken = broken
        self._known: dict[str, _Known] = {}

    @property
    def requests(self) -> frozenset[str]:
        """Who has a block for one more token than was planned."""
        return frozenset(id for id, known in self._known.items() if known.stands)

    def planned(self, plan: StepPlan) -> frozenset[str]:
        """Whose chunks of a new plan are computed already."""
        self._known = {id: known for id, known in self._known.items() if known.stands}
        covered = set()
        for chunk in plan.chunks:
            known = self._known.pop(chunk.request_id, None)
            if known is None:
                continue
            if (chunk.num_tokens, chunk.end) != (1, known.end):
                self._broken(
                    "I14",
                    f"{chunk.request_id} was computed up to {known.end}, and the plan wants "
                    f"{chunk.start} to {chunk.end - 1}",
                )
            covered.add(chunk.request_id)
        return frozenset(covered)

    def begun(self, plan: StepPlan, chunks: Iterable[Chunk]) -> None:
        """`following(plan)` returned these."""
        planned = {chunk.request_id: chunk for chunk in plan.chunks}
        for chunk in chunks:
            request = self._scheduler.requests[chunk.request_id]
            last = planned.get(request.id)
            goes_on = last is not None and last.samples and last.end == chunk.start
            if not goes_on or chunk.num_tokens != 1 or chunk.drafts:
                self._broken("I14", f"{request.id} has {chunk} behind {last}")
            left = request.max_tokens - len(request.output_ids)
            if left < 2 or chunk.end >= self._scheduler.max_model_len:
                self._broken("I14", f"{request.id} ends before what follows")
            self._known[request.id] = _Known(request, request.num_preemptions, chunk.end)

    def rolled_back(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            self._known.pop(chunk.request_id, None)
