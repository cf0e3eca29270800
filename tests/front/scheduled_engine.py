"""An engine with a real scheduler and no model: a test plans its steps and computes them, by hand,
and so chooses what comes between the two."""

from __future__ import annotations

import random
from collections.abc import Callable

from moebius.engine.client import Deliver, EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.faults import failed
from moebius.errors import EngineError, MoebiusError
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import ServingLimits
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler, StepPlan

LIMITS = ServingLimits(vocab_size=1000, max_model_len=256, priorities=True)


class ScheduledEngine:
    """What comes is taken before a plan, as in an engine's loop; what it brings is told after the
    step.

    refused   what the scheduler would not take, by the request's id
    probes    requests that the front has refused: they must not be taken, and nobody hears of them
    """

    def __init__(
        self,
        number: int,
        lost: Callable[[MoebiusError], None],
        scheduler: Scheduler,
        rng: random.Random,
    ) -> None:
        self.number = number
        self.lost = lost
        self.scheduler = scheduler
        self.inbox: list[EngineRequest | str] = []
        self.probes: set[str] = set()
        self.refused: dict[str, MoebiusError] = {}
        self.aborted: set[str] = set()
        self._rng = rng
        self._now = 0.0
        self._plan: StepPlan | None = None
        self._outputs: list[StepOutput] = []
        self._deliver: Deliver = lambda outputs: None

    @property
    def info(self) -> EngineInfo:
        pool = self.scheduler.pool
        return EngineInfo(LIMITS, frozenset(), pool.block_size, pool.num_blocks, "fp_scheduled")

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def submit(self, request: EngineRequest) -> None:
        self.inbox.append(request)

    def abort(self, request_id: str) -> None:
        self.inbox.append(request_id)
        self.aborted.add(request_id)

    def plan(self, now: float) -> None:
        """Take what has come, and begin a step."""
        self._now = now
        inbox = self.inbox
        self.inbox = []
        for item in inbox:
            self._take(item)
        self._plan = self.scheduler.plan(now)
        moved = [StepOutput(id, at=now, waits=back) for id, back in self._plan.moved.items()]
        if moved:
            self._deliver(moved)
        self._outputs += [self._end(id, FinishReason.DEADLINE) for id in self._plan.expired]

    def compute(self) -> None:
        """End the step that was planned, and tell what it has brought."""
        plan = self._plan
        self._plan = None
        if plan is not None and plan.chunks:
            requests = [self.scheduler.requests[chunk.request_id] for chunk in plan.chunks]
            drawn = {c.request_id: [self._rng.randrange(1000)] for c in plan.chunks if c.samples}
            self.scheduler.update(plan, drawn)
            for request in requests:
                if request.id in drawn:
                    self._outputs.append(self._news(request, drawn[request.id]))
        outputs = self._outputs
        self._outputs = []
        if outputs:
            self._deliver(outputs)

    def _take(self, item: EngineRequest | str) -> None:
        if isinstance(item, str):
            if self.scheduler.abort(item) is not None:
                self._outputs.append(self._end(item, FinishReason.ABORT))
            return
        try:
            self.scheduler.add(Request(item))
        except MoebiusError as error:
            self.refused[item.id] = error
            if item.id not in self.probes:
                self._outputs.append(failed(item.id, error))

    def _end(self, request_id: str, reason: FinishReason) -> StepOutput:
        error = EngineError(reason.value)
        return StepOutput(request_id, finish_reason=reason, error=error, at=self._now)

    def _news(self, request: Request, drawn: list[int]) -> StepOutput:
        return StepOutput(
            request.id,
            tuple(drawn),
            finish_reason=request.finish_reason,
            at=self._now,
            scheduled=request.scheduled,
            num_preemptions=request.num_preemptions,
        )

    def advance(self, wanted: Callable[[], bool]) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats(ready=True)

    def expert_loads(self) -> ExpertLoads:
        return ExpertLoads()

    def close(self, timeout: float) -> None:
        pass
